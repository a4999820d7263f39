"""One instruction set's run of ``test_levels``: prints what it found as one JSON object."""

import json
import sys

import torch

from autoquant.kernels.cpu import instructions, int16, onednn
from autoquant.kernels.cpu.verification import is_right
from autoquant.kernels.engine import make_engine
from autoquant.kernels.operation import LINEAR, Operation
from autoquant.kernels.reference import reference
from autoquant.spec.recipe import ActivationScheme, WeightScheme
from tests.kernels.cases import quantized

CPU = torch.device("cpu")
PLAIN = (
    # kernel, stride, padding, dilation, groups, in / groups, out / groups, spatial
    ((3, 3), (1, 1), (1, 1), (1, 1), 1, 16, 32, (14, 14)),
    ((3, 3), (2, 2), (1, 1), (1, 1), 1, 3, 16, (28, 28)),
    ((7, 7), (2, 2), (3, 3), (1, 1), 1, 3, 64, (33, 33)),
    ((1, 1), (1, 1), (0, 0), (1, 1), 1, 96, 24, (14, 14)),
    ((1, 1), (2, 2), (0, 0), (1, 1), 1, 64, 128, (14, 14)),
    ((3, 3), (1, 1), (1, 1), (1, 1), 32, 1, 1, (14, 14)),
    ((5, 5), (2, 2), (2, 2), (1, 1), 17, 1, 1, (15, 15)),
    ((3, 3), (1, 1), (1, 1), (1, 1), 8, 8, 8, (14, 14)),
    ((3, 3), (2, 2), (1, 1), (1, 1), 2, 3, 17, (14, 14)),
    ((3, 3), (1, 1), (2, 2), (2, 2), 1, 16, 16, (14, 14)),
    ((9,), (1,), (4,), (1,), 1, 40, 64, (50,)),
    ((7,), (1,), (9,), (3,), 1, 16, 16, (60,)),
    ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1, 8, 8, (5, 6, 7)),
)
ODD = (
    ((7, 4), (1, 3), (2, 2), (3, 2), 1, 17, 16, (33, 5)),
    ((11, 7), (1, 3), (1, 1), (1, 1), 4, 8, 3, (23, 7)),
    ((4, 4), (4, 4), (1, 1), (2, 2), 1, 96, 17, (33, 7)),
    ((3, 2), (1, 4), (2, 2), (1, 1), 1, 8, 8, (3, 1)),
    ((11, 7), (1, 1), (10, 3), (2, 2), 1, 96, 2, (23, 40)),
    ((5, 11), (3, 4), (1, 5), (1, 2), 4, 16, 3, (33, 14)),
    ((3, 5), (2, 1), (0, 2), (1, 1), 3, 2, 5, (9, 11)),
)
LINEARS = ((1, 64, 64), (7, 1, 3), (50, 130, 17), (300, 384, 384), (3, 1000, 1), (65, 33, 257))
SPREADS = (1.0, 1000.0)
"""All numbers beyond the ends of the grid are the largest products that there are."""


def main() -> None:
    """Compare everything that is taken with the reference; count what is not."""
    torch.manual_seed(0)
    engine = make_engine(CPU)
    found = {"vnni": instructions.has_vnni(), "amx": instructions.has_amx(), "wrong": []}
    found |= {
        "int16": int16.missing() is None,
        "in_16_bits": 0,
        "taken": 0,
        "refused": 0,
        "eight_by_eight": 0,
        "plain_refused": [],
    }
    cases = [(LINEAR, (m, k), (n, k)) for m, k, n in LINEARS]
    for kernel, stride, padding, dilation, groups, ins, outs, spatial in PLAIN + ODD:
        operation = Operation(f"conv{len(kernel)}d", stride, padding, dilation, groups)
        cases.append((operation, (2, groups * ins, *spatial), (groups * outs, ins, *kernel)))
    for i, (operation, x_shape, w_shape) in enumerate(cases):
        for bits, spread, scheme in (
            (8, 1.0, ActivationScheme(8, scale=0.03, zero_point=-7)),
            (8, 1000.0, ActivationScheme(8, scale=0.03, zero_point=-128)),
            (7, 1000.0, ActivationScheme(8, scale=0.03, zero_point=0)),
            (4, 1.0, ActivationScheme(8, "per_token", "asymmetric")),
        ):
            x, w, bias = (
                torch.randn(x_shape) * spread,
                torch.randn(w_shape),
                torch.randn(w_shape[0]),
            )
            if spread > 1.0:
                x, w = x.abs(), w.sign() * (w.abs() + 9.0)
            weight = quantized(w, WeightScheme(bits))
            product = engine.prepare(operation, weight, scheme, CPU)
            y = None if product is None else product(x, bias)
            if y is None:
                found["refused"] += 1
                rightly = product is None or (
                    isinstance(product, onednn.ConvProduct)
                    and not is_right(product.geometry(x_shape, torch.get_num_threads()))
                )
                exact = bits < 8 or found["vnni"] or found["int16"]
                # Volumes have no kernel in 16 bits.
                if not rightly or (product is None and exact and operation.kind != "conv3d"):
                    found["wrong"].append(f"refused: {operation} {x_shape} {w_shape} {bits}")
                if product is not None and i < len(LINEARS) + len(PLAIN):
                    found["plain_refused"].append(f"{operation} {x_shape} {w_shape}")
                continue
            found["taken"] += 1
            found["eight_by_eight"] += bits == 8
            found["in_16_bits"] += product.backend == "int16"
            exact = reference(operation, x, weight, scheme, bias)
            size = max(float(exact.abs().max()), float(bias.abs().max()))
            if not float((y - exact).abs().max()) <= 1e-5 * size:
                found["wrong"].append(f"{operation} {x_shape} {w_shape} {bits} {scheme}")
    print(json.dumps(found))


if __name__ == "__main__":
    onednn_missing = onednn.missing(CPU)
    sys.exit(onednn_missing) if onednn_missing else main()
