"Batches of random images, policies for them, and what tests of the callback look at"

from functools import partial

import torch
from conftest import no_bn
from fastai.vision.all import OptimWrapper, nn

from fixmatch_fastai.all import UDA, AdaMatch, Dash, DebiasMatch, FixedThreshold, FlexMatch, FreeMatch, SoftMatch
from fixmatch_fastai.uncertainty import FeatureDensity

sgd = partial(OptimWrapper, opt=torch.optim.SGD)
same = partial(torch.testing.assert_close, rtol=0, atol=0)

# with these settings some pseudo-labels count after a few steps, and some do not
POLICIES = {
    'FixedThreshold': partial(FixedThreshold, 0.18),
    'FlexMatch': partial(FlexMatch, 0.18),
    'FreeMatch': partial(FreeMatch, decay=0.5),
    'SoftMatch': partial(SoftMatch, decay=0.9),
    'AdaMatch': partial(AdaMatch, decay=0.9),
    'UDA': partial(UDA, 0.18),
    'Dash': partial(Dash, warmup=1, every=1),
    'DebiasMatch': partial(DebiasMatch, 0.18, decay=0.9),
    'FeatureDensity': partial(FeatureDensity, 0.5, n_recent=12),
    'FlexMatch | FreeMatch': lambda: FlexMatch(0.18) | FreeMatch(decay=0.5),
}


class Pool(list):
    "Unlabelled batches of a pool of twelve images"

    dataset = range(12)


def batches(n_steps=4, n_in=1, size=16, bs=4, mu=3):
    "`n_steps` labelled and unlabelled batches"
    g = torch.Generator().manual_seed(1)
    images = lambda n: torch.randn(n, n_in, size, size, generator=g)
    labeled = [(images(bs), torch.randint(0, 10, (bs,), generator=g)) for _ in range(n_steps)]
    return labeled, Pool((images(bs * mu), images(bs * mu), torch.arange(bs * mu)) for _ in range(n_steps))


def assert_alike(a, b, tol=1e-5):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=tol, atol=tol)


def memory(learn, nan=None):
    "What the policy of a learner remembers"
    state = learn.fix_match.policy.state_dict()
    return {k: v.clone() if nan is None else v.nan_to_num(nan) for k, v in state.items()}


class Spy(FixedThreshold):
    "Remembers what it was given"

    def forward(self, batch):
        self.batch, self.grad = batch, torch.is_grad_enabled()
        self.autocast = torch.is_autocast_enabled(batch.logits_weak.device.type)
        return super().forward(batch)


class Half(nn.Module):
    "Returns logits in half precision, as autocast does"

    def __init__(self, dtype):
        super().__init__()
        self.net, self.dtype = no_bn(), dtype

    def forward(self, x):
        return self.net(x).to(self.dtype)
