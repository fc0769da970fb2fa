"""Losses, foreground maps, pair quality and its weights (GenView, arXiv 2403.12003). Needs torch alone: copy this file.

    MoCo v2   info_nce           SimSiam, BYOL   negative_cosine                   VICReg    vicreg
    MoCo v3   info_nce_batch     SwAV            sinkhorn, swapped_prediction      SupCon    sup_con
    SimCLR    nt_xent            GenView         foreground_map, pair_quality, quality_weights
    NNCLR     nnclr

A loss returns one value per sample, shape (B,); the weights multiply it and the mean comes last:

    loss = info_nce(query, key, queue, 0.2)                                              # (B,)
    quality = pair_quality(clip_tokens_1, clip_tokens_2, pc)                             # (B,)
    (quality_weights(quality) * loss).mean().backward()

Everything is computed in float32, also under autocast (a GPU takes TF32 for it where the caller has allowed that).
Without a process group a function sees the batch it is given. With an initialised one it sees the global batch: every
process calls it with its own rows and gets the losses of these; only quality_weights allows their number to differ
between processes. Let each process go backward from the mean over its rows and average the gradients over the
processes, as DistributedDataParallel does: loss and gradient are those of one process that holds all the rows.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F


def _float32(tensor):
    """Autocast off for the device of `tensor`: similarities and log-sum-exp lose too much in half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


# ---------------------------------------------------------------------------------------------------
# The global batch

def _together():
    return dist.is_available() and dist.is_initialized()


class _Gather(torch.autograd.Function):
    """Rows of all processes in the order of the ranks. Every process has its own loss, and all of them depend on all
    rows: the gradient of a process's rows is the sum over the losses, which the averaging turns into that of the mean.
    """

    @staticmethod
    def forward(ctx, rows):
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)     # autograd may still need the original
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def _gather(rows):
    """(B, ...) of this process -> (N, ...) of all, and the position of its first row there. Passes gradients on."""
    return (_Gather.apply(rows), dist.get_rank() * len(rows)) if _together() else (rows, 0)


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


def info_nce_batch(query, key, temperature):
    """InfoNCE of MoCo v3 (arXiv 2104.02057, algorithm 1): the negatives are the other keys of the global batch. (B,).

    query, key: (B, D), rows L2-normalised by the caller; no gradient to the keys. This is the cross entropy of one
    direction alone. The official loss is 2 T [l(q1, k2) + l(q2, k1)]: the factor 2 T is left to the caller.

    >>> query, key = torch.eye(2), torch.eye(2)
    >>> info_nce_batch(query, key, temperature=1.0)         # log(e^1 + e^0) - 1
    tensor([0.3133, 0.3133])
    """
    with _float32(query):
        keys, first = _gather(key.detach().float())
        labels = first + torch.arange(len(query), device=query.device)
        return F.cross_entropy(query.float() @ keys.T / temperature, labels, reduction='none')


def nnclr(projection, prediction, queue, temperature):
    """NNCLR (arXiv 2104.14548, eq. 3), one direction; the method is the mean of both (algorithm 1). Returns (B,).

    projection: (B, D) of one view; prediction: (B, D) of the predictor from the other view; queue: (K, D), projections
    of the past. Rows of all three L2-normalised by the caller. The anchors are the rows of the queue that are nearest
    to the projections, their negatives the other predictions of the global batch. Gradients reach predictions alone.

    >>> eye = torch.eye(2)
    >>> nnclr(2 * eye / 3, eye, eye, temperature=1.0)       # log(e^1 + e^0) - 1
    tensor([0.3133, 0.3133])
    """
    with _float32(prediction):
        queue = queue.detach().float()
        neighbour = queue[(projection.detach().float() @ queue.T).argmax(1)]
        predictions, first = _gather(prediction.float())
        labels = first + torch.arange(len(prediction), device=prediction.device)
        return F.cross_entropy(neighbour @ predictions.T / temperature, labels, reduction='none')


def _two_view_logits(z1, z2, temperature):
    """Both views' rows against those of all processes, (2B, 2N), -inf against themselves; and where own rows begin."""
    rows = torch.cat([z1.float(), z2.float()])
    every, first = _gather(rows)
    logits = rows @ every.T / temperature
    logits.diagonal(first).fill_(-torch.inf)
    return logits, first


def nt_xent(z1, z2, temperature, mixing=None):
    """NT-Xent of SimCLR (arXiv 2002.05709, eq. 1), per sample the mean of its two directions. Returns (B,).

    z1, z2: (B, D), rows L2-normalised by the caller. Every row is an anchor; its positive is the other view, its
    negatives are both views of all other samples of the global batch. Gradients reach all of them.

    mixing: (share, partner) for negative feature transformation (arXiv 2108.02982): negative j is share * z_j + (1 -
    share) * z_partner[j], not normalised again. partner: (2N,) permutation of the global batch, first views
    before second ones. That paper mixes a queue; here a negative whose partner is the anchor or its positive stays.

    >>> z1, z2 = torch.eye(2), torch.eye(2)
    >>> nt_xent(z1, z2, temperature=1.0)                    # log(e^1 + e^0 + e^0) - 1
    tensor([0.5514, 0.5514])
    """
    with _float32(z1):
        logits, first = _two_view_logits(z1, z2, temperature)
        positive = first + torch.arange(len(logits), device=z1.device).roll(len(z1))    # z1[i] <-> z2[i]
        if mixing:
            share, partner = mixing[0], mixing[1].to(z1.device)
            column = torch.arange(len(partner), device=z1.device)                       # (process, view, sample) as
            column = column.view(-1, 2, len(z1)).transpose(0, 1).flatten()              # (view, process, sample)
            other = torch.empty_like(column).scatter_(0, column, column[partner])       # of each column of the logits
            own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, positive[:, None], True)
            own.diagonal(first).fill_(True)
            mixed = share * logits + (1 - share) * logits[:, other]                     # linear: logits mix as rows do
            logits = torch.where(own | own[:, other], logits, mixed)
        return F.cross_entropy(logits, positive, reduction='none').view(2, -1).mean(0)


def sup_con(z1, z2, labels, temperature):
    """Supervised contrastive loss (arXiv 2004.11362, eq. 2), per sample the mean over its two views. Returns (B,).

    z1, z2: (B, D), rows L2-normalised by the caller; labels: (B,) integers. The positives of an anchor are all other
    rows of its label, of both views, in the global batch; the mean over them is outside the logarithm. With labels that
    are all different it is nt_xent. The official SupConLoss multiplies with temperature / 0.07 (COP-Gen runs it at 0.1:
    x 1.43), which is left to the caller.

    >>> z1, z2 = torch.eye(2), torch.eye(2)
    >>> sup_con(z1, z2, torch.tensor([7, 7]), temperature=1.0)                # log(e + 2) - (1 + 0 + 0) / 3
    tensor([1.2181, 1.2181])
    """
    with _float32(z1):
        logits, first = _two_view_logits(z1, z2, temperature)
        labels = labels.repeat(2)
        same = labels[:, None] == _gather(labels)[0]
        same.diagonal(first).fill_(False)
        share = torch.where(same, F.log_softmax(logits, 1), 0.0).sum(1) / same.sum(1)
        return -share.view(2, -1).mean(0)


# ---------------------------------------------------------------------------------------------------
# Losses without negatives

def negative_cosine(p, z):
    """Negative cosine similarity of SimSiam (arXiv 2011.10566, eq. 1). Returns (B,) in [-1, 1].

    p: (B, D) of the predictor; z: (B, D) of the other branch, detached here. Neither need be normalised; a row of zeros
    has similarity 0. BYOL's loss (arXiv 2006.07733, eq. 2) is 2 + 2 * negative_cosine(p, z).

    >>> p, z = torch.tensor([[2., 0.], [3., 3.]]), torch.tensor([[1., 0.], [0., 1.]])
    >>> negative_cosine(p, z)
    tensor([-1.0000, -0.7071])
    """
    with _float32(p):
        return -F.cosine_similarity(p.float(), z.detach().float())


@torch.no_grad()
def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Codes of SwAV (arXiv 2006.09882, eq. 3-5): soft assignments that use all prototypes equally. (B, K), no gradient.

    scores: (B, K) similarities to the K prototypes. In turn every prototype's column is scaled to sum 1 over the global
    batch and every sample's row to sum 1; rows come last, as in the official code. On logarithms: nothing overflows,
    and a prototype far from every sample still gets its share instead of 0 / 0.

    >>> scores = torch.tensor([[1.0, 0.0], [1.0, 0.5]])     # both prefer the first prototype, the other less so
    >>> sinkhorn(scores, epsilon=0.5)
    tensor([[0.6226, 0.3774],
            [0.3776, 0.6224]])
    """
    with _float32(scores):
        codes = scores.detach().float() / epsilon
        for _ in range(iterations):
            highest = codes.amax(0)
            if _together():
                dist.all_reduce(highest, dist.ReduceOp.MAX)
            total = torch.exp(codes - highest).sum(0)
            if _together():
                dist.all_reduce(total)
            codes = F.log_softmax(codes - highest - total.log(), 1)
        return codes.exp()


def swapped_prediction(scores, codes, temperature=0.1):
    """Cross entropy between the codes of one view and the prediction from another (SwAV eq. 2). Returns (B,).

    scores: (B, K) of the predicting view; codes: (B, K) from sinkhorn of the other view, detached here.

    >>> scores, codes = torch.eye(2), torch.eye(2)
    >>> swapped_prediction(scores, codes, temperature=1.0)  # log(e^1 + e^0) - 1
    tensor([0.3133, 0.3133])
    """
    with _float32(scores):
        return -(codes.detach().float() * F.log_softmax(scores.float() / temperature, 1)).sum(1)


def _off_diagonal(centred, spread):
    """Sum of the squared elements of C = centred.T @ centred off its diagonal `spread`. centred: (N, D).

    The products of the rows, (N, N), have the same sum of squares as C, (D, D). From D = 2 N on they are taken, and the
    diagonal is subtracted: with equal variances at most half of the sum, as C has rank N. Where a few columns hold
    nearly all variance, few digits of the difference are left."""
    if centred.shape[1] >= 2 * len(centred):
        return (centred @ centred.T).square().sum() - spread.square().sum()
    matrix = centred.T @ centred
    matrix.diagonal().fill_(0)
    return matrix.square().sum()


def vicreg(z1, z2):
    """VICReg (arXiv 2105.04906, eq. 1-5). Returns invariance (B,), variance () and covariance ().

    z1, z2: (B, D), not normalised. The loss is 25 * invariance.mean() + 25 * variance + covariance; the weights of the
    pairs belong to the invariance. As the official code, which divides more than the paper: invariance is the mean over
    the dimensions (eq. 5: sum), variance the mean of the two branches' hinge losses (eq. 6: sum); covariance adds the
    branches. Variance and covariance, both / (N - 1), are those of the N >= 2 samples of the global batch and pass
    gradients to all of them.

    >>> z = torch.tensor([[1., 0.], [-1., 0.]])             # the second dimension has collapsed
    >>> vicreg(z, z)
    (tensor([0., 0.]), tensor(0.4950), tensor(0.))
    """
    with _float32(z1):
        z1, z2 = z1.float(), z2.float()
        variance = covariance = 0
        for view in _gather(torch.cat([z1, z2], 1))[0].chunk(2, 1):
            centred, rows = view - view.mean(0), len(view) - 1
            spread = centred.square().sum(0) / rows
            variance = variance + F.relu(1 - torch.sqrt(spread + 1e-4)).mean() / 2
            covariance = covariance + _off_diagonal(centred / rows ** 0.5, spread) / view.shape[1]
        return (z1 - z2).square().mean(1), variance, covariance


# ---------------------------------------------------------------------------------------------------
# Quality of a pair of views

def foreground_map(features, pc):
    """Foreground attention (GenView section 3.4): projection on the first principal component, min-max per image.

    features: (B, K, H, W) tokens of a frozen encoder; pc: (K,) or (K, 1), pointing towards the foreground, as
    fg_proportion.py writes it. Returns (B, H, W) in [0, 1]; 0.5 everywhere where the projection is the same for all
    tokens (neither foreground nor background). The tokens' mean need not be subtracted: min-max takes it back.

    >>> features = torch.tensor([[[[0., 1., 4.]], [[9., 9., 9.]]]])          # B=1, K=2, H=1, W=3
    >>> foreground_map(features, torch.tensor([1., 0.]))
    tensor([[[0.0000, 0.2500, 1.0000]]])
    """
    with _float32(features):
        projection = torch.einsum('bkhw,k->bhw', features.float(), pc.float().reshape(-1))
        low, high = projection.amin((1, 2), keepdim=True), projection.amax((1, 2), keepdim=True)
        # equal tokens differ by the rounding of a sum of K products: that is noise, not a foreground
        constant = high - low <= 1e-5 * torch.maximum(low.abs(), high.abs())
        scaled = (projection - low) / torch.where(constant, torch.ones_like(low), high - low)
        return torch.where(constant, torch.full_like(scaled, 0.5), scaled)


def pair_quality(features_1, features_2, pc):
    """Quality of pairs of views: foreground similarity minus background similarity (GenView eq. 10-12). Returns (B,).

    features_1, features_2: (B, K, H, W) tokens of the two views from the same frozen encoder (H, W may differ between
    them); pc: as in foreground_map. Values in [-2, 2], high for the same subject before another background. As in
    the official code the pooled features are not centred and each map is divided by its sum + 1e-7 (eq. 10 has no
    division; the cosine of eq. 11 takes any factor out again). A pooled vector of zeros has similarity 0.

    >>> view_1, view_2 = torch.eye(3)[:, [0, 1]], torch.eye(3)[:, [0, 2]]    # same first token, another second one
    >>> pair_quality(view_1.reshape(1, 3, 1, 2), view_2.reshape(1, 3, 1, 2), pc=torch.tensor([1., 0., 0.]))
    tensor([1.])
    """
    pooled = []
    for features in (features_1, features_2):
        foreground = foreground_map(features, pc)
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
    highest = torch.cat([score, score.new_full((1,), -torch.inf)]).max()     # -inf: a process may have no pair
    if _together():
        dist.all_reduce(highest, dist.ReduceOp.MAX)
    weight = torch.exp(score - highest)
    total = torch.stack([weight.sum(), weight.new_tensor(len(weight))])
    if _together():
        dist.all_reduce(total)
    return weight * (total[1] / total[0])
