"""``python -m autoquant``."""

from autoquant.cli import main

if __name__ == "__main__":  # processes that a task spawns import this module
    main()
