"""Models that turn a bag of tiles into one probability per class: gated attention, and two simpler ones to compare it with.

Axes: b patients, n tiles of all of them one after the other, d columns of an embedding, h hidden, c classes.
"""

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from jobs.training.feed.bags import Bags

Kind = Literal["attention", "mean", "logistic"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class ModelSpec:
    """Kind and sizes of a model; with its weights, all that is needed to build it again.

    Kinds: attention is Ilse et al. 2018, equation 9; mean the same network with equal weights for all tiles; logistic is
    logistic regression on the mean tile.
    """

    kind: Kind
    dim: int  # columns of the bags
    classes: tuple[str, ...]  # labels, in the order of the logits
    hidden: int = 256  # width of a tile after the first layer (attention, mean)
    attention: int = 128  # width of the attention network (attention)
    dropout: float = 0.25  # share of hidden values and patient-level inputs left out in training (attention, mean)
    histogram_bins: int = 0  # of the colour histogram, if the model takes it
    centers: tuple[str, ...] = ()  # known centres, if the model takes the centre; another centre is all zeros

    @property
    def extra(self) -> int:
        """Patient-level inputs beside the bag."""
        return self.histogram_bins + len(self.centers)


class BagModel(nn.Module):
    """The base of all kinds: `forward` on packed bags, and probabilities.

    `forward` takes `Bags` of the feed, on any device, and returns (logits [b, c], attention [n]). Attention is the weight of
    each tile in its patient's vector; the weights of a patient sum to 1.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self._center_index = {center: place for place, center in enumerate(spec.centers)}

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = next(iter(self.state_dict().values())).device
        return device

    @torch.inference_mode()
    def predict(self, bags: Bags) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns probabilities float32 [b, c] and attention float32 [n], on the CPU; no dropout."""
        training = self.training
        self.eval()
        try:
            logits, attention = self(bags)
        finally:
            self.train(training)
        return torch.softmax(logits.float(), 1).cpu(), attention.float().cpu()

    def _extra(self, bags: Bags) -> torch.Tensor:
        """Returns patient-level inputs, float32 [b, extra]: the histogram's square roots, then one-hot centre.

        Most of the 4096 colours of a slide are rare. By the square root of their shares (Hellinger's transform) they are not
        all zero beside the few common ones.
        """
        parts = []
        if self.spec.histogram_bins:
            if bags.color_histogram is None:
                raise ValueError("the model takes the colour histogram, and these bags have none: ask the feed for it")
            parts.append(bags.color_histogram.to(self.device, torch.float32).sqrt())
        if self.spec.centers:
            place = torch.tensor([self._center_index.get(center, -1) for center in bags.center_id])
            parts.append((place[:, None] == torch.arange(len(self.spec.centers))).to(self.device, torch.float32))
        return torch.cat(parts, 1) if parts else torch.zeros(len(bags.patient_id), 0, device=self.device)


class AttentionMIL(BagModel):
    """Gated attention over tiles, Ilse, Tomczak and Welling 2018, doi:10.48550/arXiv.1802.04712, equations 7 and 9.

    A tile's embedding is normalised (LayerNorm: embeddings of different encoders differ in scale) and passed through a
    linear layer and ReLU: h_k. Its weight is ``a_k = softmax_k(w^T (tanh(V h_k) * sigmoid(U h_k)))`` over the tiles of the
    patient, and the patient's vector is ``sum_k a_k h_k``. With kind mean every a_k is 1/K, their "embedding + mean".
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.tile = nn.Sequential(nn.LayerNorm(spec.dim), nn.Linear(spec.dim, spec.hidden), nn.ReLU())
        self.dropout = nn.Dropout(spec.dropout)
        if spec.kind == "attention":
            self.value = nn.Linear(spec.hidden, spec.attention)  # V
            self.gate = nn.Linear(spec.hidden, spec.attention)  # U
            self.score = nn.Linear(spec.attention, 1)  # w
        self.head = nn.Linear(spec.hidden + spec.extra, len(spec.classes))

    def forward(self, bags: Bags) -> tuple[torch.Tensor, torch.Tensor]:
        """See `BagModel`."""
        hidden = self.dropout(self.tile(bags.embeddings.to(self.device, torch.float32)))
        bounds = bags.offsets.tolist()
        if self.spec.kind == "attention":
            scores = self.score(torch.tanh(self.value(hidden)) * torch.sigmoid(self.gate(hidden)))[:, 0].float()
        else:
            scores = torch.zeros(len(hidden), device=self.device)
        # One bag at a time: no padding, and no scatter, whose sums of floats differ from run to run on a GPU.
        spans = list(itertools.pairwise(bounds))
        attention = torch.cat([torch.softmax(scores[start:end], 0) for start, end in spans])
        pooled = torch.stack([attention[start:end].to(hidden.dtype) @ hidden[start:end] for start, end in spans])
        extra = self.dropout(self._extra(bags)).to(pooled.dtype)
        logits: torch.Tensor = self.head(torch.cat([pooled, extra], 1))
        return logits, attention


class LogisticModel(BagModel):
    """Logistic regression on patient vectors: the mean tile, the histogram, the centre, each column standardised.

    scikit-learn fits its numbers (`jobs.training.model.logistic`); here they only predict.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        width, classes = spec.dim + spec.extra, len(spec.classes)
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(width, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros(classes, width, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(classes, dtype=torch.float64))

    def vectors(self, bags: Bags) -> torch.Tensor:
        """Returns the patient vectors for scikit-learn, float64 [b, dim + extra]."""
        means = torch.stack([bag.to(self.device, torch.float64).mean(0) for bag in bags.split()])
        return torch.cat([means, self._extra(bags).double()], 1)

    def forward(self, bags: Bags) -> tuple[torch.Tensor, torch.Tensor]:
        """See `BagModel`."""
        logits = ((self.vectors(bags) - self.mean) / self.scale) @ self.weight.T + self.bias
        sizes = bags.offsets.diff().to(self.device)
        return logits, torch.repeat_interleave(1.0 / sizes, sizes)


def build_model(spec: ModelSpec) -> BagModel:
    """Returns a model with fresh weights, from torch's random numbers."""
    return LogisticModel(spec) if spec.kind == "logistic" else AttentionMIL(spec)
