"""The base class of all methods: a DomainBed algorithm on a timm backbone.

A method of your own is a class in a file of yours, which `--import` brings in:

    @register_algorithm("MyMethod")
    class MyMethod(Algorithm):
        def prepare(self, backbone, hparams):
            for name, parameter in backbone.named_parameters():
                parameter.requires_grad = "norm" in name or "head" in name

A name may set hyperparameters, as in `BOnly@rank=16,lr=0.001`, and an objective, as in `BOnly+CORAL@rank=16`, and then
has a row of its own in every table.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from domainbed_ext.algorithms.forward import Forward
from domainbed_ext.algorithms.registry import OBJECTIVE
from domainbed_ext.algorithms.strength import Strength, check_strength, copies
from domainbed_ext.data.loader import Minibatch
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import backbones, head, precision, running_statistics
from domainbed_ext.models.device import current_device
from domainbed_ext.models.tensor_files import save_tensors
from domainbed_ext.objectives.base import Batch, Objective, Values
from domainbed_ext.objectives.registry import DEFAULT, OBJECTIVES
from domainbed_ext.system import strict_json
from domainbed_ext.system.stages import Stage, unmeasured
from vitlorafa import cast_frozen, copy_to_cpu, describe_model, speed_up

T = TypeVar("T")
Recorded = dict[str, Any]
"""What `update` returns: numbers by name, each a float or a tensor of shape []."""

TRAINED = "trained.safetensors"

_BACKBONE, _OBJECTIVE = "backbone.", "objective."
OUTSIDE = "algorithm:"  # begins a file's names of what is not in the backbone


class Algorithm(nn.Module):
    """Minimises an objective over the parameters that `prepare` leaves trainable, by AdamW.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Number of classes.
        num_domains: Number of training environments.
        hparams: Hyperparameters of the run.

    Attributes:
        objective: What is minimised; the mean cross-entropy unless the method's name has another.
        stage: Context that `--profile` opens around each part of an update.
        backbone_digest: Digest of the weights that were loaded; None where they start at random.
        start: What `keep_start` kept, on the CPU, by the names that `trained` gives it; None until then.
        updated: Whether `update` of this class ran, which a method with an `update` of its own may not call.
        scaler: Scaler of the loss in fp16; None in other precisions.
        domain_losses: Mean cross-entropy of each training domain's images in the last step, for the record; None where
            `update` of this class did not run, or the objective changes images.
        leaves_values: Whether `update` returns numbers as tensors of shape [], so as on a GPU: reading one waits for
            the step, and meanwhile nothing of the next one is queued.
    """

    stage: Stage = staticmethod(unmeasured)
    updated = False
    scaler: GradScaler | None = None
    domain_losses: "list[float] | Tensor | None" = None
    leaves_values = False

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, num_domains: int, hparams: dict[str, Any]
    ) -> None:
        super().__init__()
        self.hparams = hparams
        self.device = current_device()
        self.leaves_values = self.device.type != "cpu"
        self.precision = precision.choose(hparams["precision"], self.device)
        precision.check(self.precision, self.device)
        self.scaler = GradScaler(self.device.type) if self.precision == "fp16" else None
        self.backbone = backbones.create(
            hparams["backbone"], hparams["weights"], num_classes, image_size=hparams["image_size"]
        )
        if hparams.get("head_start") == "zero":
            head.set_to_zero(self.backbone)
        self.backbone_digest = None if hparams["weights"] == "none" else backbones.loaded_digest(self.backbone)
        objective = OBJECTIVES.find(hparams.get(OBJECTIVE, DEFAULT)).load()
        with torch.random.fork_rng(devices=()):  # adapters start the same with every objective
            self.objective: Objective = objective(num_classes, num_domains, hparams)
            self.objective.prepare(self.backbone)
        self.prepare(self.backbone, hparams)
        speed_up(self.backbone)
        if self.precision != "float32":
            cast_frozen(self.backbone, precision.DTYPES[self.precision])
        self.to(self.device)
        model = Forward(self)
        model.check(self.objective)
        self.objective.attach(self.backbone, model)
        self._buffers_before = {name: buffer.clone() for name, buffer in self._own(self.named_buffers())}
        if self.starts_at_probe:
            head.find_linear(self.backbone, hparams)
        self.start: dict[str, Tensor] | None = None
        self.optimizer = self.make_optimizer(self._trained_parameters(), hparams)
        if extra := [parameter for parameter in self.objective.parameters() if parameter.requires_grad]:
            self.optimizer.add_param_group({"params": extra, **self.objective.optimizer_options()})

    def prepare(self, backbone: nn.Module, hparams: dict[str, Any]) -> None:
        """Adapts the backbone in place, and sets `requires_grad` of its parameters.

        Args:
            backbone: Timm model with a new head.
            hparams: Hyperparameters of the run.
        """
        raise TypeError(f"{type(self).__name__} has no method prepare, which chooses what trains")

    def make_optimizer(self, parameters: list[nn.Parameter], hparams: dict[str, Any]) -> torch.optim.Optimizer:
        """Makes the optimizer of the trainable parameters; fused, because it passes over memory once."""
        return torch.optim.AdamW(parameters, lr=hparams["lr"], weight_decay=hparams["weight_decay"], fused=True)

    def begin(self, steps: int, minibatches: Callable[[int], Iterable[list[Minibatch]]]) -> None:
        """Is called before the first step of a run, and not when it resumes.

        Args:
            steps: Number of training steps.
            minibatches: Function that returns the minibatches of the run's first steps; of fewer if there are fewer.
        """

    def penalty(self) -> Tensor | None:
        """Computes what the method adds to the objective's loss; None for nothing."""
        return None

    def after_step(self) -> None:
        """Is called after each step of the optimizer, while the gradients of the step are still there."""

    def update(self, minibatches: list[Minibatch], unlabeled: list[Tensor] | None = None) -> Recorded:
        """One step on the objective.

        With `accumulate`, the loss is computed on one part of the images after another, and gradients and values are
        means over the parts. With `clip_grad`, gradients are then scaled down to that norm: those that the objective
        leaves, so SAM's at the higher point, and before the optimizer corrects them, as for LoRA-Pro. In fp16 the loss
        is scaled, so that small gradients are not lost; a step whose gradients are not finite is left out, and the
        scale is lowered.

        Args:
            minibatches: Images [batch, channels, height, width] and labels [batch] of each training environment.
            unlabeled: Images of the test environments; not used.

        Returns:
            The loss of the step, and what else the objective records of it: numbers on a CPU, and tensors of shape []
            on a GPU (see `leaves_values`), which `float` reads.
        """
        self.train()
        self.updated = True
        parts, model = self.parts(minibatches), Forward(self)
        losses: list[Tensor | None] = []  # of the domains in each part

        def compute() -> Values:
            self.optimizer.zero_grad(set_to_none=True)
            values = []
            for part in parts:
                batch = Batch.of(part, self.device)
                values.append(self._add_gradients(batch, model, len(parts)))
                losses.append(model.domain_losses(batch, self.objective.label_smoothing))
            return {name: torch.stack([each[name] for each in values]).sum(0) / len(parts) for name in values[0]}

        self.objective.before_step(self.optimizer)
        values = self.objective.gradients(compute, self._trained_parameters())
        with self.stage("optimizer"):
            values = {**values, **self._step()}
        first = [each for each in losses[: len(parts)] if each is not None]  # SAM computes twice
        domains = torch.stack(first).mean(0) if len(first) == len(parts) else None
        self.domain_losses = domains if domains is None or self.leaves_values else domains.tolist()
        return {name: value if self.leaves_values else value.item() for name, value in values.items()}

    def _step(self) -> Values:
        """Takes the step of the optimizer, unless fp16 has gradients that are not finite; returns what is recorded."""
        if self.scaler is None:
            values = self._clip_gradients()
            self.optimizer.step()
            self.after_step()
            return values
        values = {"loss_scale": torch.tensor(self.scaler.get_scale())}
        self.scaler.unscale_(self.optimizer)
        if self._has_finite_gradients():
            values |= self._clip_gradients()
            self.scaler.step(self.optimizer)
            self.after_step()
        self.scaler.update()
        return values

    def _has_finite_gradients(self) -> bool:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return bool(get_total_norm(gradients, norm_type=math.inf).isfinite())

    def parts(self, minibatches: list[Minibatch]) -> list[list[Minibatch]]:
        """Splits the images of a step into those that are in memory at once: `accumulate` minibatches of each domain.

        Args:
            minibatches: Images and labels of each training environment.
        """
        count = self.hparams.get("accumulate", 1)
        split = [
            zip(images.tensor_split(count), labels.tensor_split(count), strict=True) for images, labels in minibatches
        ]
        return [list(part) for part in zip(*split, strict=True)]

    def _add_gradients(self, batch: Batch, model: Forward, parts: int) -> Values:
        """Adds the gradients of a part of a step, of several; returns the values of its loss."""
        with self.stage("forward"):
            values = self.objective(batch, model)
            if (penalty := self.penalty()) is not None:
                values = {**values, "loss": values["loss"] + penalty}
        with self.stage("backward"):
            loss = values["loss"] / parts
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return {name: value.detach() for name, value in values.items()}

    def _clip_gradients(self) -> Values:
        """Scales the gradients of the trained parameters, all together, down to `clip_grad`; returns their norm."""
        largest = self.hparams.get("clip_grad")
        return {} if largest is None else {"grad_norm": clip_grad_norm_(self._trained_parameters(), largest)}

    def scale_rates(self, factor: float) -> None:
        """Sets the learning rate of each parameter group, of all optimizers, to a multiple of its own.

        Args:
            factor: Factor of the rates that the groups were made with.

        Raises:
            BenchmarkError: The method has no optimizer as an attribute, or a schedule of its own.
        """
        parts = vars(self).values()
        optimizers = [part for part in parts if isinstance(part, Optimizer)]
        if not optimizers or any(isinstance(part, LRScheduler) for part in parts):
            lack = "a schedule of its own" if optimizers else "no optimizer as an attribute"
            raise BenchmarkError(f"{type(self).__name__} has {lack}: leave schedule and warmup out")
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])  # a checkpoint holds both

    @property
    def learning_rate(self) -> float | None:
        """The learning rate of the last step, of the optimizer's first parameter group; None without an optimizer."""
        optimizer = getattr(self, "optimizer", None)
        return float(optimizer.param_groups[0]["lr"]) if isinstance(optimizer, Optimizer) else None

    def logits(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width] → [batch, num_classes], for training."""
        return self.backbone(images)

    def weights(self) -> dict[str, Tensor]:
        """The trained weights of the backbone without its classifier by name, differentiable, each up to a constant.

        A method with adapters overrides this: the weight of an adapted layer is what its adapter makes of it.
        """
        classifier = head.tensors(self.backbone)
        named = self.backbone.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad and parameter not in classifier}

    def predict(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] → logits [batch, num_classes]."""
        with precision.autocast(self.precision, self.device):
            return self.backbone(x.to(self.device, non_blocking=True)).float()

    @cached_property
    def _strength(self) -> Strength:
        return Strength()

    @property
    def starts_at_probe(self) -> bool:
        """Whether the head starts at the linear probe, so that strength 0 is the probe."""
        hparams = getattr(self, "hparams", {})  # a method may build itself in its own way
        return bool(hparams.get("head_start") == "probe")

    def keep_start(self) -> None:
        """Keeps the present weights as those of strength 0, for `set_strength`: before they train or are loaded.

        These are the parameters that training changes themselves: not the factors of adapters, nor a head that does
        not start at the probe. Training alone needs no such copy.
        """
        moved = self._interpolated()
        self.start = copies((name, tensor) for name, tensor in moved.items() if tensor.requires_grad)

    def set_strength(self, strength: float) -> None:
        """Scales what training changed: from now on, the algorithm predicts with start + strength · (trained − start).

        At 1 these are the trained weights, to the last bit; at 0 those that training started from. Statistics of
        BatchNorm are interpolated too, for those of the trained weights do not fit the weights at the start. A head
        that does not start at the probe stays as trained: at 0, the trained head then reads the pretrained backbone.

        An algorithm trains, saves and loads at strength 1 only.

        Args:
            strength: Strength, from 0 to 1.

        Raises:
            BenchmarkError: It is not from 0 to 1, or there is no start.
        """
        check_strength(strength)
        if self.start is None:
            raise BenchmarkError("set_strength needs the weights of strength 0: call keep_start() before they train")
        moved = self._interpolated()
        buffers = {_in_file(name): before for name, before in self._buffers_before.items() if self._is_changed(name)}
        start = {**self.start, **{name: before for name, before in buffers.items() if name in moved}}
        self._strength.set(strength, moved, start)

    def is_changed_itself(self, name: str) -> bool:
        """Returns whether the change of a tensor is start + strength · (trained − start) of the tensor itself.

        A method with adapters overrides this: it is not so for their factors, whose update `set_strength` scales.

        Args:
            name: Name as in `trained`.
        """
        return True

    def start_head(self, probe: Mapping[str, Tensor]) -> None:
        """Lets the head start at a linear probe.

        Args:
            probe: "weight" [classes, width] and, if the head has one, "bias" [classes].
        """
        linear = head.find_linear(self.backbone, self.hparams)
        with torch.no_grad():
            for name, parameter in linear.named_parameters():
                parameter.copy_(probe[name])

    def _interpolated(self) -> dict[str, Tensor]:
        """The tensors that interpolate between the start and what was trained, with some that never change."""
        fixed = set() if self.starts_at_probe else head.tensors(self.backbone)
        here = {_in_file(name): tensor for name, tensor in self._named_tensors().items()}
        return {name: tensor for name, tensor in here.items() if tensor not in fixed and self.is_changed_itself(name)}

    def training_state(self) -> dict[str, Any]:
        """All that training changes, for a checkpoint: tensors and plain values.

        These are `state_dict()` without frozen parameters, and the states of attributes that have one, such as
        optimizers and schedules. A method that keeps more overrides this and `load_training_state`.
        """
        self._strength.check_full("a checkpoint")
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        tensors = {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}
        parts = {name: part.state_dict() for name, part in vars(self).items() if hasattr(part, "load_state_dict")}
        return {"tensors": tensors, "parts": parts}

    def prediction_state(self) -> dict[str, Any]:
        """The part of `training_state` that `predict` depends on: no objective, optimizers, schedules and scalers."""
        state = self.training_state()
        parts = {
            name: part
            for name, part in state.get("parts", {}).items()
            if not isinstance(getattr(self, name, None), (Optimizer, LRScheduler, GradScaler))
        }
        return {**state, "tensors": dict(self._own(state["tensors"].items())), "parts": parts}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restores what `training_state` or `prediction_state` returned, in an algorithm of the same arguments."""
        self._strength.check_full("loading")
        self.load_state_dict(state["tensors"], strict=False)
        for name, part in state["parts"].items():
            getattr(self, name).load_state_dict(part)

    def train(self, mode: bool = True) -> "Algorithm":
        """Keeps frozen normalisation layers in evaluation mode, so that their statistics do not move."""
        super().train(mode)
        for module in running_statistics.frozen(self):
            module.eval()
        return self

    def trained(self) -> dict[str, Tensor]:
        """What training changed: trainable parameters, and buffers, such as statistics, that differ from the start.

        Names are the backbone's; names of tensors outside of it begin with "algorithm:".
        """
        self._strength.check_full("saving")
        here = self._named_tensors()
        parameters = [name for name, parameter in here.items() if parameter.requires_grad]
        return {_in_file(name): here[name] for name in [*parameters, *filter(self._is_changed, here)]}

    def moving(self) -> dict[str, Tensor]:
        """What steps move and predictions depend on: trainable parameters, and statistics of norms that train, by name.

        An average over steps is one of these tensors. Whatever else a method predicts with is that of the last step.
        """
        parameters = {name: each for name, each in self.named_parameters() if each.requires_grad}
        return dict(self._own([*parameters.items(), *running_statistics.moving(self).items()]))

    def save(self, folder: Path) -> None:
        """Saves the trained tensors in a folder, as safetensors, without the frozen ones."""
        write_trained(folder, self.trained(), self.backbone)

    def load(self, folder: Path) -> None:
        """Loads what `save` wrote, into an algorithm of the same arguments."""
        self.load_trained(folder / TRAINED, lambda name: True)

    def _named_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the state dict, each once, without those of the objective."""
        kept = self.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.named_buffers() if name in kept}
        return dict(self._own([*self.named_parameters(), *buffers.items()]))

    @staticmethod
    def _own(named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """What is not the objective's, which predictions do not depend on."""
        return ((name, value) for name, value in named if not name.startswith(_OBJECTIVE))

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self._own(self.named_parameters()) if parameter.requires_grad]

    def _is_changed(self, name: str) -> bool:
        """Whether it is a buffer that differs from the start."""
        now, before = dict(self.named_buffers()).get(name), self._buffers_before.get(name)
        return now is not None and (before is None or not torch.equal(before.to(now), now))

    def load_trained(self, path: Path, wanted: Callable[[str], bool]) -> None:
        """Loads the tensors of a file that are wanted, by name; each has to be there and to fit."""
        self._strength.check_full("loading")
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            has_statistics = file.metadata() is not None
        here = {_in_file(name): tensor for name, tensor in self._named_tensors().items() if wanted(_in_file(name))}
        frozen = {
            name for name, tensor in here.items() if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        }
        places = {name: tensor for name, tensor in here.items() if name not in frozen}
        misfits = [name for name in tensors if name not in places or places[name].shape != tensors[name].shape]
        misfits += [name for name, tensor in places.items() if tensor.requires_grad and name not in tensors]
        if misfits:
            raise BenchmarkError(
                f"{path} does not fit this {type(self).__name__} ({misfits[0]}, {len(misfits)} in all): give the run's "
                "own backbone and number of classes"
            )
        moving = [norm for norm in running_statistics.norms(self) if norm not in running_statistics.frozen(self)]
        if moving and not has_statistics:
            raise BenchmarkError(
                f"{path} was written by an earlier version, which left out the statistics of {len(moving)} BatchNorm "
                "layers: run it again"
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                places[name].copy_(tensor)


def _in_file(name: str) -> str:
    return name.removeprefix(_BACKBONE) if name.startswith(_BACKBONE) else OUTSIDE + name


def write_trained(folder: Path, tensors: dict[str, Tensor], backbone: nn.Module) -> None:
    """Saves the trained tensors.

    Args:
        folder: Folder to write into; created if it is missing.
        tensors: Tensors by name, as `Algorithm.trained` gives them.
        backbone: Model of the tensors, which the file describes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(copy_to_cpu(tensors), folder / TRAINED, {"model": strict_json.dumps(describe_model(backbone))})
