"""Losses, foreground maps, pair quality and its weights (GenView, arXiv 2403.12003). Needs torch alone: copy this file.

A loss returns one value per sample, shape (B,); the weights multiply it and the mean comes last:

    loss = info_nce(query, key, queue, 0.2)                                              # (B,)
    quality = pair_quality(clip_tokens_1, clip_tokens_2, pc)                             # (B,)
    (quality_weights(quality) * loss).mean().backward()

Everything is computed in float32, also under autocast. With an initialised process group the weights see the whole
global batch, so that B samples on one process and B/2 on each of two give the same gradient; without one they see the
batch they are given.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F


def _float32(tensor):
    """Autocast off for the device of `tensor`: similarities and log-sum-exp lose too much in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


# ---------------------------------------------------------------------------------------------------
# Contrastive losses

def info_nce(query, positive, queue, temperature):
    """InfoNCE of MoCo (GenView eq. 2): -log of the positive's share among the positive and the queue. Returns (B,).

    query: (B, D), positive: (B, D), queue: (K, D), rows of all three L2-normalised by the caller. temperature > 0.
    Gradients reach query and positive, never the queue, which is copied: it may be overwritten before backward().

    >>> query, queue = torch.eye(2), -torch.eye(2)
    >>> info_nce(query, query, queue, temperature=1.0)      # log(e + e^-1 + e^0) - 1
    tensor([0.4076, 0.4076])
    """
    with _float32(query):
        query, positive = query.float(), positive.float()
        negatives = queue.detach().to(torch.float32, copy=True)
        logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ negatives.T], 1) / temperature  # (B, 1+K)
        return torch.logsumexp(logits, 1) - logits[:, 0]


# ---------------------------------------------------------------------------------------------------
# Quality of a pair of views

def foreground_map(features, pc, mean=None):
    """Foreground attention (GenView section 3.4): projection on the first principal component, min-max per image.

    features: (B, K, H, W) tokens of a frozen encoder; pc: (K,) or (K, 1), pointing towards the foreground, as
    fg_proportion.py writes it; mean: (K,) or None. Returns (B, H, W) in [0, 1]; 0.5 everywhere where the projection is
    the same for all tokens (neither foreground nor background). Subtracting the mean moves every projection by the same
    amount, which min-max takes back: with or without it the map is the same.

    >>> features = torch.tensor([[[[0., 1., 4.]], [[9., 9., 9.]]]])          # B=1, K=2, H=1, W=3
    >>> foreground_map(features, torch.tensor([1., 0.]))
    tensor([[[0.0000, 0.2500, 1.0000]]])
    """
    with _float32(features):
        pc = pc.float().reshape(-1)
        projection = torch.einsum('bkhw,k->bhw', features.float(), pc)
        if mean is not None:
            projection = projection - mean.float().reshape(-1) @ pc
        low, high = projection.amin((1, 2), keepdim=True), projection.amax((1, 2), keepdim=True)
        # equal tokens differ by the rounding of a sum of K products: that is noise, not a foreground
        constant = high - low <= 1e-5 * torch.maximum(low.abs(), high.abs())
        scaled = (projection - low) / torch.where(constant, torch.ones_like(low), high - low)
        return torch.where(constant, torch.full_like(scaled, 0.5), scaled)


def pair_quality(features_1, features_2, pc, mean=None):
    """Quality of pairs of views: foreground similarity minus background similarity (GenView eq. 10-12). Returns (B,).

    features_1, features_2: (B, K, H, W) tokens of the two views from the same frozen encoder (H, W may differ between
    them); pc, mean: as in foreground_map. Values in [-2, 2], high for the same subject before another background. As in
    the official code the pooled features are not centred and each map is divided by its sum + 1e-7 (eq. 10 has no
    division; the cosine of eq. 11 takes any factor out again). A pooled vector of zeros has similarity 0.

    >>> view_1, view_2 = torch.eye(3)[:, [0, 1]], torch.eye(3)[:, [0, 2]]    # same first token, another second one
    >>> pair_quality(view_1.reshape(1, 3, 1, 2), view_2.reshape(1, 3, 1, 2), pc=torch.tensor([1., 0., 0.]))
    tensor([1.])
    """
    pooled = []
    for features in (features_1, features_2):
        foreground = foreground_map(features, pc, mean)
        with _float32(features):
            for attention in (foreground, 1 - foreground):
                attention = attention / (attention.sum((1, 2), keepdim=True) + 1e-7)
                pooled.append(torch.einsum('bkhw,bhw->bk', features.float(), attention))
    (foreground_1, background_1), (foreground_2, background_2) = pooled[:2], pooled[2:]
    return F.cosine_similarity(foreground_1, foreground_2) - F.cosine_similarity(background_1, background_2)


@torch.no_grad()
def quality_weights(quality, temperature=1.0):
    """Weights of the pairs: softmax over the global batch, scaled to mean 1 (eq. 13-14). Returns (B,), detached.

    quality: (B,) of this process; temperature > 0: weight ~ exp(quality / temperature), the larger the more even.
    With an initialised process group every process must call; their batches may differ in size, and the mean is 1 over
    all of them together. (Eq. 13 alone would sum to 1 and shrink the loss by the batch size; the official code scales
    like this but looks at the batch of one GPU only.)

    >>> quality_weights(torch.tensor([0.0, 0.0, 3.0]).log1p())               # proportional to 1, 1, 4
    tensor([0.5000, 0.5000, 2.0000])
    """
    score = quality.detach().float() / temperature
    together = dist.is_available() and dist.is_initialized()
    highest = torch.cat([score, score.new_full((1,), -torch.inf)]).max()     # -inf: a process may have no pair
    if together:
        dist.all_reduce(highest, dist.ReduceOp.MAX)
    weight = torch.exp(score - highest)
    total = torch.stack([weight.sum(), weight.new_tensor(len(weight))])
    if together:
        dist.all_reduce(total)
    return weight * (total[1] / total[0])
