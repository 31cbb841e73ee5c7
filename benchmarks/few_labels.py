"What the benchmarks of small networks share: few labels of some images, and the learner of `make demo`"

from dataclasses import dataclass

from fastai.vision.all import Learner, parent_label, set_seed

from fixmatch_fastai.all import FixMatch, FixMatchTransform, split_labeled, weak_augment
from fixmatch_fastai.cli.comparison import choose_pool, hold_out, small_learner


@dataclass
class FewLabels:
    files: list
    n_labels: int = 40
    steps: int = 500
    mu: int = 7
    lr: float = 0.01
    num_workers: int = 2
    n_test: int = None
    size: int = None
    flip: bool = True
    bs: int = 16  # that of `small_learner`

    def __post_init__(self):
        self.train, self.test = hold_out(self.files, self.n_test)
        self.weak = weak_augment(flip=self.flip)

    def pool(self, seed):
        "The unlabelled images, and the labelled ones among them, as in the paper"
        return choose_pool(self.train, self.n_labels, None, seed)

    def learner(self, seed, semi, **kwargs) -> Learner:
        "A fresh one, of one epoch of all steps; `kwargs` are of `FixMatch`"
        labeled, _ = split_labeled(self.train, parent_label, self.n_labels, seed)
        set_seed(seed)
        learn = small_learner(labeled, self.test, self.steps, self.weak, self.size)
        if not semi:
            return learn
        tfm = FixMatchTransform(weak=self.weak)
        opts = dict(mu=self.mu, tfm=tfm, label_func=parent_label, num_workers=self.num_workers)
        return learn.add_cb(FixMatch(learn.dls.unlabeled_dl(self.pool(seed), **opts), **kwargs))
