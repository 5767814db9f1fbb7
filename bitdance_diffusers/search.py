"""Search while drawing: several candidates of every picture are drawn side by side, and the best of them go on.

Shapes: B pictures, n candidates of each, M patches, P tokens a patch, D width of the transformer.
"""

from collections.abc import Callable, Sequence

import torch

from .generation import Generation
from .scoring import draw_score_noise, score_patches

# Of the model's own score: it is to cost little beside drawing, and every patch of a picture adds to it.
NUM_TIMES, NUM_DRAWS = 4, 2

CandidateScorer = Callable[[torch.Tensor], Sequence[float]]


class CandidateSearch:
    """
    `n` candidates of every picture of a generation. After each round of patches the best `num_kept` of them go on as n
    again: the key/value cache is copied, nothing is read twice. [`~.finish`] leaves the best one.

    Args:
        generation: before its first patch, of pictures of one size. It becomes one of B n pictures, the candidates
            of a picture side by side, each with a generator of its own.
        num_candidates (`int`): n.
        num_kept (`int`): how many go on; divides n.
        patches_per_round (`int`): patches between two choices.
        scorer (*optional*): `(code so far (B n, C, h, w)) -> B n scores`, higher is better, the candidates of a
            picture side by side. None is the model's own score of all patches so far, with the conditions that they
            were drawn with, see [`score_patches`].
    """

    def __init__(
        self,
        generation: Generation,
        num_candidates: int,
        num_kept: int,
        patches_per_round: int,
        scorer: CandidateScorer | None = None,
    ):
        self.generation = generation
        self.num_candidates = num_candidates
        self.num_kept = num_kept
        self.patches_per_round = patches_per_round
        self.scorer = scorer
        self.num_pictures = len(generation.pictures)
        first = generation.pictures[0]
        self._noise = draw_score_noise(NUM_TIMES, NUM_DRAWS, *first.patches.shape)
        self._scores = torch.zeros(self.num_pictures * num_candidates)
        generation.separate_generators()
        generation.fork([i for i in range(self.num_pictures) for _ in range(num_candidates)])

    @torch.no_grad()
    def advance(self) -> None:
        """Draw the next patch of all candidates, and at the end of a round choose."""
        generation, scored = self.generation, self.scorer is None
        generation.prepare()
        index = generation.pictures[0].index
        condition = generation.condition if scored else None
        generation.advance()
        if scored:
            patches = torch.stack([picture.patches[index] for picture in generation.pictures])
            self._scores += score_patches(
                generation.transformer,
                generation.scheduler,
                condition[:, None],  # (B n, 1, P, D)
                patches[:, None],
                self._noise[:, :, index : index + 1],
                generation.attention_kwargs,
            )[:, 0].cpu()
        if (index + 1) % self.patches_per_round == 0 and not generation.finished:
            self._keep(self.num_kept, self.num_candidates)

    def finish(self) -> None:
        """Leave the best candidate of every picture."""
        self._keep(1, 1)

    def _keep(self, num_kept: int, num_candidates: int) -> None:
        """Go on with the best `num_kept` candidates of every picture, as `num_candidates`."""
        if self.scorer is not None:
            self._scores = torch.as_tensor(self.scorer(self.generation.code), dtype=torch.float32).flatten()
        scores = self._scores.view(self.num_pictures, -1)  # (B, n)
        best = scores.topk(num_kept, dim=1).indices + scores.shape[1] * torch.arange(len(scores))[:, None]  # (B, k)
        chosen = best.repeat_interleave(num_candidates // num_kept, dim=1).flatten().tolist()
        self.generation.fork(chosen)
        self._scores = self._scores[chosen]
