"""The steps of training: one batch, its loss, its gradients, what they move."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.methods.reconstruction.distillation import Distillation
from autoquant.methods.training import Training
from autoquant.training.guard import (
    Finding,
    GradientWatch,
    LossWatch,
    bound_scales,
    is_dead,
)
from autoquant.training.learner import ACTIVATION, WEIGHT, load
from autoquant.training.objective import Seen, loss_of, seeing
from autoquant.training.oscillation import Oscillation
from autoquant.training.rates import Rate, make_optimizer, sizes_of
from autoquant.training.schedule import Lessons, rate_at
from autoquant.training.student import Student

MEAN = "mean of the way"
Run = Callable[[nn.Module, Any], Any]
Augment = Callable[[Any], Any]
AVERAGED = 20.0
"""All steps are so many times the steps that the mean of the way reaches back."""
LOWERED = 0.5
"""What a rate is multiplied with where training went astray."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """What training is given.

    ``run`` (model, inputs) → outputs is the user's forward; ``classes`` says that outputs are
    scores of classes; ``scorer`` is the layer whose outputs are decoded. ``modules`` are those
    whose outputs count, by name of their site. ``augment`` makes other inputs of inputs. ``loss``
    (outputs, targets) → a tensor with one number is the task's own, for inputs with targets.
    """

    inputs: Lessons
    run: Run
    classes: bool
    scorer: nn.Module | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    augment: Augment | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    seed: int = 0

    def taught(self, student: Student, inputs: Any, features: Mapping[str, nn.Module]) -> Seen:
        """Return what the teacher, the float model, gives on a batch, with layers' outputs."""
        with student.teaching(), seeing(features, self.scorer) as seen:
            seen.outputs = self.run(student.applier.prepared.model, inputs)
        return seen


class Trainer:
    """Trains a student step by step.

    The state after n steps depends on the start and on n alone, so that training that was
    interrupted goes on as if it never was (``state``, ``load``). ``losses`` are those of the steps
    since whoever looks at them cleared them. ``layers`` is what the rates of each layer are
    multiplied by.
    """

    def __init__(
        self,
        student: Student,
        lesson: Lesson,
        technique: Training,
        layers: Mapping[str, float] | None = None,
    ) -> None:
        self.student = student
        self.lesson = lesson
        self.technique = technique
        self.done = 0
        self.losses: list[float] = []
        self.findings: list[Finding] = []
        self._batch = technique.batch
        self._share = technique.features if isinstance(technique, Distillation) else 0.0
        self._labels = 0.0
        if isinstance(technique, Distillation) and lesson.loss is not None:
            self._labels = technique.labels
        self._features = dict(lesson.modules) if self._share else {}
        self._start = _copied(student)
        self._optimizer = make_optimizer(student, technique, self._usual_outputs(), layers)
        self._oscillation = {n: Oscillation(x.integers()) for n, x in student.learners.items()}
        self._loss_watch, self._gradient_watch = LossWatch(), GradientWatch(technique.clip)
        self._off: set[str] = set()
        self._averaged = 0
        self._average = {(n, k): p.detach().clone() for n, k, p in student.parameters()}
        self._safe = self.state()

    def _usual_outputs(self) -> dict[str, float]:
        """Return the size of each layer's outputs in the float model, on the first batch."""
        inputs = self.lesson.inputs.at(self._order().places(0))
        with self.student.teaching(), seeing(self.lesson.modules, None) as seen:
            self.lesson.run(self.student.applier.prepared.model, inputs)
        return sizes_of(seen.features)

    def _order(self) -> Any:
        return self.lesson.inputs.order(self._batch, self.lesson.seed)

    @property
    def frozen(self) -> float:
        """The share of all weights that are frozen since they went back and forth."""
        rows = list(self._oscillation.values())
        return sum(int(r.frozen.sum()) for r in rows) / max(sum(r.frozen.numel() for r in rows), 1)

    def rates(self) -> tuple[Rate, ...]:
        """Return what each site and kind learns at, as of the last step."""
        self._set_rates(max(self.done - 1, 0))  # a step that went back has not set them
        found = []
        for group in self._optimizer.param_groups:
            on = group["site"] not in self._off
            rate, share = (group["lr"], group["share"]) if on else (0.0, 0.0)
            found.append(Rate(group["site"], group["kind"], rate, share))
        return tuple(found)

    def keep(self) -> None:
        """Say that all is well so far: what training goes back to where it goes astray."""
        self._safe = self.state()

    def step(self) -> None:
        """Take one step. Raises TrialError where the user's code fails or nothing has a gradient.

        Where one batch doesn't fit the memory, batches are halved from here on.
        """
        while True:
            try:
                return self._step()
            except (MemoryError, torch.OutOfMemoryError):
                if self._batch == 1:
                    raise
                self._batch //= 2
                self._find("", "out of memory", f"batches have {self._batch} samples from here on")

    def _step(self) -> None:
        number, technique = self.done, self.technique
        loss, gradients = self._gradients(number)
        self.losses.append(float(loss))
        wrong = self._loss_watch.astray(float(loss))
        if wrong is not None:
            return self._go_back("", wrong)
        self._set_rates(number)
        by_site: dict[str, list[Tensor]] = {name: [] for name in self.student.learners}
        for (name, _), gradient in gradients.items():
            by_site[name].append(gradient)
        for name, mine in by_site.items():
            if not self._gradient_watch.heed(name, mine):
                return self._go_back(name, "its gradient is not finite")
        for name, kind, parameter in self.student.parameters():
            parameter.grad = None if name in self._off else gradients.get((name, kind))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for name, learner in self.student.learners.items():
            for kind in bound_scales(learner, self._start[name]):
                what = "an activation scale ran off" if kind == ACTIVATION else "a scale ran off"
                self._stop_kind(name, kind, what, "held at twice, or half, its start")
            seen = self._oscillation[name]
            seen.see(learner.integers(), technique.freezing)
            if bool(seen.frozen.any()):
                learner.hold(seen.frozen, seen.held())
        self._add_to_average()
        self.done += 1
        return None

    def _add_to_average(self) -> None:
        """Move the mean of the way towards where the parameters are now."""
        self._averaged += 1
        share = max(1.0 / (self._averaged + 1), AVERAGED / self.technique.steps)
        for name, kind, parameter in self.student.parameters():
            self._average[name, kind].lerp_(parameter.detach(), min(share, 1.0))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the student at the mean of its way inside, instead of where noise took it last."""
        rows = list(self.student.parameters())
        kept = [p.detach().clone() for _, _, p in rows]
        with torch.no_grad():
            for name, kind, parameter in rows:
                parameter.copy_(self._average[name, kind])
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, _, parameter), own in zip(rows, kept, strict=True):
                    parameter.copy_(own)

    def _gradients(self, number: int) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
        """Return the loss of one step's batch, and the gradient of each parameter that has one."""
        lesson, student = self.lesson, self.student
        places = self._order().places(number)
        inputs = lesson.inputs.at(places)
        device = next(iter(student.learners.values())).device
        generator = torch.Generator(device).manual_seed((lesson.seed << 24) + number)
        model = student.applier.prepared.model
        if lesson.augment is not None:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed((lesson.seed << 24) + number)
                inputs = lesson.augment(inputs)
        alone = self._labels == 1.0
        theirs = Seen() if alone else lesson.taught(student, inputs, self._features)
        rows = list(student.parameters())
        with torch.enable_grad(), student.learning(generator):
            with seeing(self._features, lesson.scorer) as ours:
                ours.outputs = lesson.run(model, inputs)
            parts = []
            if not alone:
                far = loss_of(ours, theirs, classes=lesson.classes, features=self._share)
                parts.append((1.0 - self._labels) * far)
            if lesson.loss is not None and self._labels:
                own = lesson.loss(ours.outputs, lesson.inputs.targets_at(places))
                parts.append(self._labels * own)
            loss = torch.stack([part.to(parts[0].device) for part in parts]).sum()
            found = torch.autograd.grad(loss, [p for _, _, p in rows], allow_unused=True)
        known = zip(rows, found, strict=True)
        return loss.detach(), {(n, k): g for (n, k, _), g in known if g is not None}

    def _set_rates(self, number: int) -> None:
        technique = self.technique
        share = rate_at(number, technique.steps, round(technique.warmup * technique.steps))
        for group in self._optimizer.param_groups:
            group["lr"] = group["base"] * group["share"] * share

    def _go_back(self, layer: str, what: str) -> None:
        """Return to the last safe state, with lower rates: of one layer, or of all."""
        step, batch, losses, findings = self.done, self._batch, self.losses, self.findings
        shares = [
            g["share"] * (LOWERED if layer in ("", g["site"]) else 1.0)
            for g in self._optimizer.param_groups
        ]
        self.load(self._safe)
        for group, share in zip(self._optimizer.param_groups, shares, strict=True):
            group["share"] = share
        # The same batches would come again, so only the parameters go back, not the clock.
        self.done, self._batch = step + 1, batch
        self.losses, self.findings = losses, findings
        self._loss_watch.forget()
        whose = "its rates" if layer else "all rates"
        self._find(layer, what, f"back to the last check, and {whose} are halved", step)

    def _stop_kind(self, name: str, kind: str, what: str, done: str) -> None:
        for group in self._optimizer.param_groups:
            if group["site"] == name and group["kind"] == kind and group["share"]:
                group["share"] = 0.0
                self._find(name, what, done)

    def check(self) -> None:
        """Look for layers that training broke, and take them back."""
        for name, learner in self.student.learners.items():
            if name not in self._off and is_dead(learner) and not self._was_dead(name):
                load(learner, self._start[name])
                self._off.add(name)
                self._find(name, "all its weights became one number", "trained no more")

    def _was_dead(self, name: str) -> bool:
        first = self._start[name][WEIGHT].round()
        return bool((first == first.flatten()[0]).all())

    def _find(self, layer: str, what: str, done: str, step: int | None = None) -> None:
        self.findings.append(Finding(self.done if step is None else step, layer, what, done))

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on, as tensors and numbers by name."""
        tensors: dict[str, Tensor] = {}
        for name, kind, parameter in self.student.parameters():
            tensors[f"{name}|{kind}"] = parameter.detach().clone()
            tensors[f"{name}|{kind}|{MEAN}"] = self._average[name, kind].clone()
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{name}|{kind}|{key}"] = value.clone()
        for name, seen in self._oscillation.items():
            for key, value in seen.state().items():
                tensors[f"{name}||{key}"] = value.clone()
        return {
            "tensors": tensors,
            "done": self.done,
            "batch": self._batch,
            "averaged": self._averaged,
            "losses": list(self.losses),
            "usual": self._gradient_watch.state(),
            "recent": self._loss_watch.state(),
            "shares": [g["share"] for g in self._optimizer.param_groups],
            "off": sorted(self._off),
            "findings": [[f.step, f.layer, f.what, f.done] for f in self.findings],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` returned, here or in another process.

        In another process that is what training goes back to where it goes astray (``keep``).
        """
        tensors = state["tensors"]
        for name, kind, parameter in self.student.parameters():
            with torch.no_grad():
                parameter.copy_(tensors[f"{name}|{kind}"])
            own = _below(f"{name}|{kind}|", tensors)
            self._average[name, kind] = own.pop(MEAN)
            self._optimizer.state.pop(parameter, None)
            if own:
                self._optimizer.state[parameter] = own
        for name, seen in self._oscillation.items():
            seen.load(_below(f"{name}||", tensors))
        self.done, self._batch = state["done"], state["batch"]
        self._averaged = state["averaged"]
        self.losses = list(state["losses"])
        self._gradient_watch.load(state["usual"])
        self._loss_watch.load(state["recent"])
        for group, share in zip(self._optimizer.param_groups, state["shares"], strict=True):
            group["share"] = share
        self._off = set(state["off"])
        self.findings = [Finding(*row) for row in state["findings"]]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the tensors whose names begin with ``prefix``, by the rest of the name."""
    return {k[len(prefix) :]: v.clone() for k, v in tensors.items() if k.startswith(prefix)}


def _copied(student: Student) -> dict[str, dict[str, Tensor]]:
    return {
        name: {kind: p.detach().clone() for kind, p in learner.parameters.items()}
        for name, learner in student.learners.items()
    }
