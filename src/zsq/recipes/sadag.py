"""SADAG: Genie's images, moved until the student's gradients change little around each of them.

Paper: Hoang-Anh, Pham, Le, Cai, Do, "Sharpness-Aware Data Generation for Zero-shot Quantization", ICML
2024, arXiv:2510.07018. Genie's images; a student that a short reconstruction on them has made and that is
thrown away; refinement of latents and generators against it; Genie's reconstruction, from the full-precision
weights.

Where the paper and its published code differ, or the code is in error, this is what is followed:

* Neighbours are searched from a random start. The code's search starts where the similarity has its maximum
  and thus no slope, and follows rounding noise (`refinement.neighbour=published` does the same).
* The generator's learning rate decays every 100 steps, as in synthesis; the code's decays in every step
  (`refinement.generator_decay_interval=1`).
* What is remembered of finished batches has no history; the code keeps their graphs alive.
* Images are those of the final latents and generators; the code keeps those of one step before.
* The weights of the three terms are 1, as in the code; the paper's summaries disagree on their order.
* At W8A8 and W8 images are not refined: the residual is too small to have a direction.
* Gradients are those of the last layer, before its own activation quantizer, as in the code.
* Not in the paper: `refinement.bn_hold=true` lets the weight of the BatchNorm loss grow while that loss is
  above what it was before the refinement, and `refinement.bn_relative=true` divides it by that: the terms
  have no common unit, and on a network whose BatchNorm loss is small (WRN-16-1) the other two move images
  away from its statistics, which costs 3 points at W2A2; `refinement.swing=true` has swing convolutions in
  the loss of synthesis, as synthesis does; `refinement.rounds=2` learns the student anew halfway;
  `refinement.match_focus=1` weighs the least similar images more. None is on, as none made SADAG better than
  Genie on two networks and was confirmed by a third (benchmarks/results/sadag_ablation.md, sadag_turn.md).

With a smaller budget there are fewer steps, and the learning rates grow in proportion, up to 20 times.
Measured on cifar100_resnet20s, W2A4, 64 images of 300 steps of synthesis (in bfloat16), a student of 100
steps a unit, 30 steps of refinement, seed 0. Similarity is that to neighbours searched anew at radius 1, mean
of 4 searches; change is the root mean square over pixels, which have deviation 1:

    rates of latents and generator         BatchNorm   similarity   change
    before refinement                          0.379        0.619
    1e-5, 1e-4, decay in every step            0.267        0.715     0.06
    1e-5, 1e-4                                 0.249        0.769     0.09
    1e-2, 3e-4                                 0.225        0.870     0.17
    1e-2, 1e-3                                 0.204        0.908     0.23
    3e-2, 3e-3                                 0.186        0.919     0.40

The rates of the standard budget (1.7e-4, 1.7e-3) change these images by 0.27.

A step of refinement costs 4.5 to 5 of synthesis (processor time, both in float32, measured in
benchmarks/results/refinement_cost.md), so that one for ten of those costs 0.45 to 0.5 of the synthesis,
besides the student (0.1). With `refinement.neighbour=carried`, which is in neither paper nor code, it is 0.3;
with that and gradients of the last unit 0.37, of all units 1.5 to 2.
"""

from dataclasses import replace

from zsq.images.settings import Refinement
from zsq.recipes.genie import GENIE

SADAG = replace(
    GENIE,
    name="sadag",
    paper="Sharpness-Aware Data Generation for Zero-shot Quantization, ICML 2024, arXiv:2510.07018",
    refinement=Refinement(),
)
