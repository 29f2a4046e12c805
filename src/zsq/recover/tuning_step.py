"""One step of fine-tuning: the views of a minibatch, what the teacher says of them, the descent."""

import torch
from torch import Tensor, nn

from zsq.distributed import Group
from zsq.images.crops import crop, draw_crops
from zsq.images.low_pass import low_pass, low_pass_gain
from zsq.out_of_memory import in_chunks
from zsq.quant.dropping import Rows
from zsq.recover.network_outputs import Observed, Outputs, joined, parts_of_loss
from zsq.recover.reconstruct import CHUNK, take
from zsq.recover.settings import FineTuning


class Views:
    """The images as training sees them: cropped, flipped and filtered."""

    def __init__(self, images: Tensor, settings: FineTuning) -> None:
        self._images, self._settings = images, settings
        self.count, self.size = len(images), (images.shape[2], images.shape[3])
        low = settings.low_pass
        self._gain = None if low is None else low_pass_gain(low, *self.size, images.device)

    def __call__(self, index: Tensor, rng: torch.Generator | None, rows: Rows | None = None) -> Tensor:
        """Images of these indices; crops and flips are drawn from `rng`, if it is given."""
        images = take(self._images, index.to(self._images.device))
        if self._settings.augment and rng is not None:
            rows = rows or Rows(0, len(images), len(images))
            boxes = draw_crops(rows.count, self.size, self._settings.crop_scale, rng)
            images = crop(images, boxes[rows.start : rows.stop].to(images.device))
        if self._gain is not None:
            images = low_pass(images, self._gain)
        return images.contiguous(memory_format=torch.channels_last)


class Step:
    """One step of the optimizer on one minibatch; made once, so that nothing is set up in the loop."""

    def __init__(
        self,
        student: Observed,
        teacher: Observed,
        views: Views,
        labels: Tensor,
        optimizer: torch.optim.SGD,
        settings: FineTuning,
        group: Group,
    ) -> None:
        self.student, self.teacher, self.views, self.labels = student, teacher, views, labels
        self.optimizer, self.settings, self.group = optimizer, settings, group
        self.parameters: list[nn.Parameter] = optimizer.param_groups[0]["params"]
        self.device = labels.device
        self.reduced = torch.autocast(
            self.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"
        )
        # Without augmentation the teacher sees the same images every time; a step up the slope needs its own.
        cached = not settings.augment and settings.perturbation is None
        self.cache = self._all_teacher_outputs() if cached else None

    def __call__(self, batch: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """Draw the views of a minibatch, descend; this process's share of the loss by parts."""
        count, group = len(batch), self.group
        if count >= group.size:
            mine = group.share(count)
            share = (mine.stop - mine.start) / count
        else:  # all do the same
            mine, share = slice(0, count), 1 / group.size
        index = batch[mine].to(self.device)
        images, labels = self.views(index, rng, Rows(mine.start, mine.stop, count)), self.labels[index]
        perturbation = self.settings.perturbation
        self.optimizer.zero_grad()
        if perturbation is not None:
            images.requires_grad_()
        parts = self._parts(images, labels, index, maps=True)
        loss = torch.stack(list(parts.values())).sum() * share
        loss.backward(inputs=[*self.parameters, images] if perturbation is not None else self.parameters)
        if perturbation is not None:
            assert images.grad is not None
            moved = (images + perturbation.size * images.grad.sign()).detach()
            again = torch.stack(list(self._parts(moved, labels, None, maps=False).values())).sum()
            parts["perturbed"] = perturbation.weight * again
            (parts["perturbed"] * share).backward(inputs=self.parameters)
        self.group.add([p.grad for p in self.parameters if p.grad is not None])
        self.optimizer.step()
        parts = {name: part.detach() * share for name, part in parts.items()}
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def means(self, totals: dict[str, Tensor], steps: int) -> dict[str, float]:
        """Means over steps and processes of sums of what the steps returned; waits for the device."""
        joint = torch.stack(list(totals.values()))
        self.group.add([joint])
        return dict(zip(totals, (joint / steps).tolist(), strict=True))

    def _parts(
        self, images: Tensor, labels: Tensor, index: Tensor | None, *, maps: bool
    ) -> dict[str, Tensor]:
        if self.cache is not None and index is not None:
            wanted = self.cache.rows(index)
        else:
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

    def _all_teacher_outputs(self) -> Outputs:
        def outputs(rows: slice) -> Outputs:
            index = torch.arange(rows.start, rows.stop)
            return self._teacher_outputs(self.views(index, None), self.labels[rows], maps=True)

        found = in_chunks(outputs, self.views.count, CHUNK, "the teacher's pass")
        return joined([piece for _, piece in found])
