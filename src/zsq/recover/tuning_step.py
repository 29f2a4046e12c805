"""One step of fine-tuning: the views of a minibatch, what the teacher says of them, the descent."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zsq.distributed import Group
from zsq.images.crops import crop, draw_crops
from zsq.images.low_pass import low_pass, low_pass_gain
from zsq.kernels import computing_in
from zsq.out_of_memory import in_chunks
from zsq.quant.choice import Rows
from zsq.recover.network_outputs import Observed, Outputs, joined, parts_of_loss
from zsq.recover.settings import FineTuning, Mixup
from zsq.recover.turns import Minibatch
from zsq.recover.unit_tensors import CHUNK


class Views:
    """Images as training sees them: mixed, cropped, flipped and filtered.

    Args:
        size: (H, W) of the images.
        settings: what is done to them.
        device: where they are.
    """

    def __init__(self, size: tuple[int, int], settings: FineTuning, device: torch.device) -> None:
        self._settings, self.size = settings, size
        low = settings.low_pass
        self._gain = None if low is None else low_pass_gain(low, *self.size, device)

    def __call__(self, images: Tensor, rng: torch.Generator | None, rows: Rows | None = None) -> Tensor:
        """Images `rows` of a minibatch (of all); mixtures and crops are drawn from `rng`, if it is given."""
        rows = rows or Rows(0, len(images), len(images))
        if self._settings.mixup is not None and rng is not None:
            images = mixed(images, self._settings.mixup, rng)
        images = images[rows.start : rows.stop]
        if self._settings.augment and rng is not None:
            boxes = draw_crops(rows.count, self.size, self._settings.crop_scale, rng)
            images = crop(images, boxes[rows.start : rows.stop].to(images.device))
        if self._gain is not None:
            images = low_pass(images, self._gain)
        return images.contiguous(memory_format=torch.channels_last)


def mixed(images: Tensor, settings: Mixup, rng: torch.Generator) -> Tensor:
    """Each of (N, C, H, W) times its share, plus another of them, in random order, times what is left.

    Source: TexQ (NeurIPS 2023), which mixes the images of a minibatch and leaves their labels.
    """
    shares = settings.smallest + (1 - settings.smallest) * torch.rand(len(images), generator=rng)
    others = torch.randperm(len(images), generator=rng).to(images.device)
    share = shares.to(images.device).view(-1, 1, 1, 1)
    return share * images + (1 - share) * images[others]


@torch.no_grad()
def clip_to_share(parameters: Sequence[nn.Parameter], share: float, lr: float) -> None:
    """Scale all gradients by one factor of at most 1, so that lr ||gradients|| <= share ||parameters||.

    Norms are Euclidean, over all parameters that have a gradient. Waits for no device.

    Source: clipping by the global norm, Pascanu et al. (arXiv:1211.5063); a bound relative to the norm of the
    weights as in the trust ratio of LARS (You et al., arXiv:1708.03888), here of the network as a whole.
    """
    moved = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in moved if p.grad is not None]
    most = share / lr * nn.utils.get_total_norm(moved)
    factor = (most / nn.utils.get_total_norm(gradients)).clamp(max=1.0)  # 1 where all gradients are 0
    for gradient in gradients:
        gradient.mul_(factor)


class Step:
    """One step of the optimizer on one minibatch; made once, so that nothing is set up in the loop."""

    def __init__(
        self,
        student: Observed,
        teacher: Observed,
        views: Views,
        optimizer: torch.optim.SGD,
        settings: FineTuning,
        group: Group,
    ) -> None:
        self.student, self.teacher, self.views = student, teacher, views
        self.optimizer, self.settings, self.group = optimizer, settings, group
        self.parameters: list[nn.Parameter] = optimizer.param_groups[0]["params"]
        self.reduced = computing_in(settings.precision, self.parameters[0].device)
        self.cache: Outputs | None = None
        # Whether the teacher's logits of the images as they are, are all that the losses need of it.
        self.logits_do = (
            self.sees_the_same
            and settings.low_pass is None
            and settings.maps is None
            and settings.features is None
        )

    @property
    def sees_the_same(self) -> bool:
        """Whether the teacher sees the same whenever it is shown an image; a step up the slope is its own."""
        settings = self.settings
        return not settings.augment and settings.mixup is None and settings.perturbation is None

    def __call__(self, batch: Minibatch, rng: torch.Generator) -> dict[str, Tensor]:
        """Draw the views of a minibatch, descend; this process's share of the loss by parts.

        "loss" is the sum of those of the student; parts of the generator that made the images are besides.
        """
        images, labels, known, share = self._shown(batch, rng)
        perturbation = self.settings.perturbation
        self.optimizer.zero_grad()
        if perturbation is not None:
            images.requires_grad_()
        parts = self._parts(images, labels, known, maps=True)
        loss = torch.stack(list(parts.values())).sum() * share
        loss.backward(inputs=[*self.parameters, images] if perturbation is not None else self.parameters)
        if perturbation is not None:
            assert images.grad is not None
            moved = (images + perturbation.size * images.grad.sign()).detach()
            again = torch.stack(list(self._parts(moved, labels, None, maps=False).values())).sum()
            parts["perturbed"] = perturbation.weight * again
            (parts["perturbed"] * share).backward(inputs=self.parameters)
        self.group.add([p.grad for p in self.parameters if p.grad is not None])
        if self.settings.clip is not None:
            clip_to_share(self.parameters, self.settings.clip, self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        parts = {name: part.detach() * share for name, part in parts.items()}
        generator = {f"generator_{name}": part / self.group.size for name, part in batch.parts.items()}
        return {"loss": torch.stack(list(parts.values())).sum(), **parts, **generator}

    def loss(self, batch: Minibatch, rng: torch.Generator) -> float:
        """The loss of a minibatch, without that of images moved up its slope; waits for the device."""
        images, labels, known, share = self._shown(batch, rng)
        parts = self._parts(images, labels, known, maps=True)
        total = torch.stack(list(parts.values())).detach().double().sum() * share
        return self.means({"loss": total}, 1)["loss"]

    def _shown(self, batch: Minibatch, rng: torch.Generator) -> tuple[Tensor, Tensor, Outputs | None, float]:
        """This process's part of a minibatch.

        Its images as drawn, their labels, what is known of the teacher's outputs, and what share of it it is.
        """
        count, group = len(batch.labels), self.group
        if count >= group.size:
            mine = group.share(count)
            share = (mine.stop - mine.start) / count
        else:  # all do the same
            mine, share = slice(0, count), 1 / group.size
        labels, index = batch.labels[mine], None if batch.index is None else batch.index[mine]
        images = self.views(batch.images, rng, Rows(mine.start, mine.stop, count))
        known = None
        if self.cache is not None and index is not None:
            known = self.cache.rows(index)
        elif self.logits_do and batch.logits is not None:
            known = Outputs(batch.logits[mine], None, ())
        return images, labels, known, share

    def means(self, totals: dict[str, Tensor], steps: int) -> dict[str, float]:
        """Means over steps and processes of sums of what the steps returned; waits for the device."""
        joint = torch.stack(list(totals.values()))
        self.group.add([joint])
        return dict(zip(totals, (joint / steps).tolist(), strict=True))

    def _parts(
        self, images: Tensor, labels: Tensor, wanted: Outputs | None, *, maps: bool
    ) -> dict[str, Tensor]:
        """Parts of the loss; `wanted` is what the teacher gives, None if it has to be asked."""
        if wanted is None:
            wanted = self._teacher_outputs(images, labels, maps=maps)
        own = self.student(images, labels, maps=maps)
        return parts_of_loss(own, wanted, labels, self.settings, self.views.size)

    def _teacher_outputs(self, images: Tensor, labels: Tensor, *, maps: bool) -> Outputs:
        """Those of the teacher; with history only if the images have one."""
        maps = maps and self.settings.maps is not None
        with torch.set_grad_enabled(images.requires_grad or maps), self.reduced:
            found = self.teacher(images, labels, maps=maps)
        if images.requires_grad:  # the slope passes through both networks, but not through the maps' target
            return Outputs(found.logits, found.constant().maps, found.attentions)
        return found.constant()

    def remember(self, images: Tensor, labels: Tensor) -> None:
        """Let the teacher see all images once, for minibatches that tell their index.

        Only where it would see the same every time.
        """
        if not self.sees_the_same:
            return

        def outputs(rows: slice) -> Outputs:
            return self._teacher_outputs(self.views(images[rows], None), labels[rows], maps=True)

        found = in_chunks(outputs, len(images), CHUNK, "the teacher's pass")
        self.cache = joined([piece for _, piece in found])
