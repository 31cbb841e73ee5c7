"""Self-training and FixMatch on the same few labels, with as many steps for the last network of each method.

Every run is a line in self_training.csv, so that an interrupted benchmark goes on where it was;
self_training.md is the table made of it.
"""

import argparse
import time
import warnings
from functools import partial
from pathlib import Path

warnings.filterwarnings('ignore', category=FutureWarning)  # before fastai is imported

import pandas as pd
import torch
from fastai.vision.all import get_image_files, parent_label, set_seed
from few_labels import FewLabels
from policies import hardware
from runs import add_run, read_runs

from fixmatch_fastai.all import FixMatchTransform, digits_path, pseudo_label, with_pseudo_labels
from fixmatch_fastai.experiment.networks import small_cnn
from fixmatch_fastai.self_training.meta_pseudo_labels import MetaPseudoLabels
from fixmatch_fastai.self_training.students import NoisyStudent, self_distill, semi_weak
from fixmatch_fastai.self_training.warm_start import load_body, rotation_dls

HERE = Path(__file__).parent
KEY = ['images', 'labels', 'steps', 'method', 'seed']
COLUMNS = [*KEY, 'accuracy', 'pseudo_acc', 'all_steps', 'cpu_seconds', 'n_test', 'hardware']

ABOUT = """# Self-training, measured

`make bench-self-training` prints this page; every run is a line of `benchmarks/self_training.csv`. The images are the
digits that come with scikit-learn. All methods get the same labels, the same small network (two convolutions), Adam
with one cycle up to a learning rate of 0.01, the same starting weights and as many steps for the network that is
judged; teachers and warm starts come on top, as the column *steps in all* says. FixMatch's steps see 16 labelled and
112 unlabelled images (each twice), students' steps 64 images; the supervised steps 16. The pool holds the labelled
images too.

| method | what it is |
| --- | --- |
| supervised | the labels alone |
| pseudo-labels | the supervised network's answers with a confidence of 0.95 or more, hard, beside the labels |
| self-distillation | its soft answers on the labelled images, `self_distill` |
| self-distillation, pool | the same on all images |
| semi-weak | its 40 most confident images of each class, then the labels for the last tenth of the steps, `semi_weak` |
| Noisy Student | two rounds on soft, balanced answers, with RandAugment, Cutout and dropout of 0.2, `NoisyStudent` |
| Meta Pseudo Labels | a teacher that learns from the student, then labels for the last tenth, `MetaPseudoLabels` |
| rotation, supervised | a body that has learned to tell turns of the pool's images, then the labels |
| FixMatch | `FixMatch` |
| rotation, FixMatch | that body, then `FixMatch` |

The network and the learning rate are those of `make demo`, which were settled by looking at supervised training and
FixMatch with 40 digits; the settings of the other methods are written in the table and were not tuned. Runs as short
as these say how methods start, not how they end.
"""


class Methods:
    "One run of each method, for one seed"

    def __init__(self, comparison, seed):
        self.comparison, self.seed, self.steps, self.n_steps = comparison, seed, comparison.steps, 0

    @property
    def pool(self):
        return self.comparison.pool(self.seed)

    def learner(self, semi=False):
        return self.comparison.learner(self.seed, semi)

    def fit(self, learn, share=1.0, lr=None):
        "One cycle of `share` of the steps"
        self.n_steps += round(share * self.steps)
        learn.dls = learn.dls.repeat_train(round(share * self.steps))
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(1, lr or self.comparison.lr)
        return learn

    def last_tenth(self, learn):
        return self.fit(learn, 0.1, self.comparison.lr / 10)

    def student(self, dls):
        "A fresh network for images with pseudo-labels"
        learn = self.learner()
        learn.dls, learn.loss_func = dls, dls.train_ds.loss_func
        return learn

    @property
    def student_bs(self):
        return 4 * self.comparison.bs

    def teacher(self):
        return self.fit(self.learner())

    def supervised(self):
        return self.fit(self.learner())

    def pseudo_labels(self):
        teacher = self.teacher()
        labels = pseudo_label(teacher, self.pool, threshold=0.95)
        return self.fit(self.student(with_pseudo_labels(teacher.dls, labels, bs=self.student_bs)))

    def self_distillation(self):
        return self_distill(self.teacher(), self.student, self.fit, bs=self.student_bs)

    def self_distillation_pool(self):
        return self_distill(self.teacher(), self.student, self.fit, items=self.pool, bs=self.student_bs)

    def semi_weak(self):
        fit = partial(self.fit, share=0.9)
        return semi_weak(self.teacher(), self.student, fit, self.pool, self.last_tenth, k=40, bs=self.student_bs)

    def noisy_student(self):
        strong = FixMatchTransform(weak=self.comparison.weak).strong
        opts = dict(rounds=2, bs=self.student_bs, strong=strong, dropout=0.2)
        return NoisyStudent(self.teacher(), self.student, self.fit, self.pool, **opts).fit()

    def meta_pseudo_labels(self):
        learn, tfm = self.learner(), FixMatchTransform(weak=self.comparison.weak)
        set_seed(self.seed + 1000)
        teacher = small_cnn(1, learn.dls.c)
        opts = dict(mu=self.comparison.mu, num_workers=self.comparison.num_workers)
        unlabeled_dl = learn.dls.unlabeled_dl(self.pool, tfm=tfm, label_func=parent_label, **opts)
        learn.add_cb(MetaPseudoLabels(teacher, unlabeled_dl))
        self.fit(learn, 0.9)
        learn.remove_cb(MetaPseudoLabels)
        return self.last_tenth(learn)

    def body(self):
        "Trained to tell turns"
        learn = self.learner()
        learn.dls = rotation_dls(self.pool, learn.dls, bs=128)
        learn.model = small_cnn(1, 4)
        return self.fit(learn)

    def rotation_supervised(self):
        learn = self.learner()
        load_body(learn, self.body())
        return self.fit(learn)

    def fixmatch(self):
        return self.fit(self.learner(True))

    def rotation_fixmatch(self):
        body = self.body()
        learn = self.learner(True)
        load_body(learn, body)
        return self.fit(learn)


METHODS = {
    'supervised': Methods.supervised,
    'pseudo-labels': Methods.pseudo_labels,
    'self-distillation': Methods.self_distillation,
    'self-distillation, pool': Methods.self_distillation_pool,
    'semi-weak': Methods.semi_weak,
    'Noisy Student': Methods.noisy_student,
    'Meta Pseudo Labels': Methods.meta_pseudo_labels,
    'rotation, supervised': Methods.rotation_supervised,
    'FixMatch': Methods.fixmatch,
    'rotation, FixMatch': Methods.rotation_fixmatch,
}


def run(comparison, images, method, seed):
    "Train once; returns the line of the table"
    runs, start = Methods(comparison, seed), time.process_time()
    learn = METHODS[method](runs)
    seconds = time.process_time() - start  # of this process: other work on the machine does not count
    with learn.no_bar(), learn.no_logging():
        preds, truth = learn.get_preds(dl=learn.dls.valid)
        table = pseudo_label(learn, runs.pool)
    right = [parent_label(f) == p for f, p in zip(table.file, table.predicted)]
    row = dict(images=images, labels=comparison.n_labels, steps=comparison.steps, method=method, seed=seed)
    row |= dict(accuracy=float((preds.argmax(1) == truth).float().mean()), pseudo_acc=sum(right) / len(right))
    row |= dict(all_steps=runs.n_steps, n_test=len(truth), cpu_seconds=seconds, hardware=hardware())
    return {k: round(row[k], 4) if isinstance(row[k], float) else row[k] for k in COLUMNS}


def table(rows):
    "Markdown: a table for each number of labels"
    rows = rows.sort_values('method', key=lambda s: s.map(list(METHODS).index), kind='stable')
    pm = lambda s: f'{100 * s.mean():.1f}' + (f' ± {100 * s.std():.1f}' if len(s) > 1 else '')
    text = [ABOUT]
    for (images, labels, steps), part in rows.groupby(['images', 'labels', 'steps']):
        base = part[part.method == 'supervised'].set_index('seed').accuracy
        seeds = part.groupby('method').seed.nunique().min()
        text += [
            f'## {images}, {labels} labels',
            '',
            f'{steps:,} steps, {seeds} seed{"s" if seeds > 1 else ""}, {part.n_test.iloc[0]} test images; '
            f'mean ± standard deviation. {part.hardware.iloc[-1]}, one thread.',
            '',
            '| method | accuracy, % | gain over supervised, same seeds | better in | steps in all | CPU seconds |',
            '| --- | --- | --- | --- | --- | --- |',
        ]
        for method, o in part.groupby('method', sort=False):
            diff = (o.set_index('seed').accuracy - base).dropna()
            compared = method != 'supervised' and len(diff) > 0
            gain, better = (pm(diff), f'{(diff > 0).sum()} of {len(diff)}') if compared else ('–', '–')
            cost = f'{o.all_steps.mean():,.0f} | {o.cpu_seconds.mean():.0f}'
            text.append(f'| {method} | {pm(o.accuracy)} | {gain} | {better} | {cost} |')
        text.append('')
    return '\n'.join(text).rstrip() + '\n'


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--images', type=Path, help='a folder of grey images in class folders (default: the digits)')
    p.add_argument('--labels', type=int, nargs='+', default=[20, 40], help='numbers of labelled images')
    p.add_argument('--n-test', type=int, help='test images (default: 400 digits, or a quarter of --images)')
    p.add_argument('--steps', type=int, default=400, help='training steps of the network that is judged')
    p.add_argument('--seeds', type=int, default=3, help='how many times, with other labels and starting weights')
    p.add_argument('--only', nargs='+', help='methods to run (default: all)')
    p.add_argument('--workers', type=int, default=1, help='processes that make views')
    p.add_argument('--out', type=Path, default=HERE, help='where self_training.csv and self_training.md go')
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    unknown = set(args.only or []) - set(METHODS)
    if unknown:
        p.error(f'there is no method {sorted(unknown)}: use any of {list(METHODS)}')
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / 'self_training.csv'
    images = args.images.name if args.images else 'digits'
    files = get_image_files(args.images or digits_path()).sorted()
    done = read_runs(results, COLUMNS).to_dict('records')
    for seed in range(args.seeds):
        for labels in args.labels:
            n_test = args.n_test if args.images else args.n_test or 400
            opts = dict(n_test=n_test, flip=args.images is not None)
            comparison = FewLabels(files, labels, args.steps, num_workers=args.workers, **opts)
            for method in args.only or METHODS:
                key = [images, labels, comparison.steps, method, seed]
                if any([o[k] for k in KEY] == key for o in done):
                    continue
                row = run(comparison, images, method, seed)
                add_run(results, COLUMNS, row)
                done.append(row)
                found = f'{100 * row["accuracy"]:.1f} %, {row["cpu_seconds"]:.0f} s'
                print(f'{images}, {labels} labels, seed {seed}: {method} {found}', flush=True)
    text = table(pd.read_csv(results))
    (args.out / 'self_training.md').write_text(text)
    print(text)


if __name__ == '__main__':
    main()
