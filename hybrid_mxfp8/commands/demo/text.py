"""Six paragraphs for the demo's encoder, of lengths that make the experts' groups ragged."""

from __future__ import annotations

from typing import Final

PARAGRAPHS: Final[tuple[str, ...]] = (
    "A mixture-of-experts layer keeps many feed-forward networks and sends each token to only a few of them. The "
    "parameters grow with the number of experts, while the arithmetic done for one token stays the same. A small "
    "router, usually a single linear layer, scores the experts for every token; the best few are kept, and their "
    "outputs are added up with the router's weights.",
    "Routing makes the work ragged. In one step an expert may receive four hundred tokens and its neighbour none at "
    "all, and the next step looks different again. The counts are known only to the device, so a host that wants to "
    "launch one matrix product for each expert must first wait for them. Waiting is expensive: the queue of kernels "
    "runs dry, and at small batch sizes the accelerator spends more time idle than computing. A grouped product "
    "avoids the question. One kernel is launched for all experts, reads the offsets where they are, and decides on "
    "the device which tile of which expert each block of threads should work on.",
    "Decoding is bound by memory.",
    "When only a handful of sequences is being generated, each expert that was chosen must still be read in full, "
    "and nearly all the time goes into streaming its weights. Halving the bytes of a weight nearly halves the time of a "
    "step. That is why eight-bit formats matter here even before a single multiplication becomes faster, and why a "
    "format that loses accuracy is so tempting and so dangerous.",
    "Eight bits can't cover the range of a whole tensor well. A few channels of a transformer's activations are often "
    "tens or hundreds of times larger than the rest, and one scale that fits the largest of them pushes the small ones "
    "towards zero. Microscaling gives every 32 neighbouring elements a scale of their own, a power of two stored in one "
    "byte. An outlier then spoils only its own block, and multiplying by the scale is exact, because it changes nothing "
    "but the exponent. The price is one byte for every thirty-two, about three per cent, and a layout of those bytes "
    "that the tensor cores can read: tiles of 128 rows by four columns, written by the quantizer in the order in which "
    "the hardware wants them. Padding rows are written as zeros, so that equal inputs always give equal bytes.",
    "How should one check such a kernel? Against a plain implementation that anybody can read, bit by bit where the "
    "arithmetic is exact, and within a bound derived from the arithmetic where it is not. Then one backend against "
    "another, on ragged groups, empty experts and odd sizes.",
)
