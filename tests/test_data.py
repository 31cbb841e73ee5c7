"Loaders in other processes, and shapes of all kinds"

import subprocess
import sys
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import quiet_fit, tiny_net
from fastai.callback.data import WeightedDL
from fastai.vision.all import DataLoaders, FlipItem, ImageDataLoaders, Learner, PILImage, Resize, parent_label, set_seed
from PIL import Image

from fixmatch_fastai.all import FixMatch, FixMatchTransform, weak_augment


def same_image(n):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (16, 16), dtype=np.uint8)] * n


@pytest.mark.parametrize('num_workers', [0, 2])
def test_stream_repeats_under_seed(make_dls, pool, num_workers):
    loader = make_dls().unlabeled_dl(pool, mu=2, num_workers=num_workers)

    def draw():
        set_seed(7)
        stream = loader.stream()
        out = [next(stream) for _ in range(4)]
        stream.close()
        return out

    for a, b in zip(draw(), draw()):
        for o, p in zip(a, b):
            assert torch.equal(o, p)


def test_workers_draw_different_views(make_dls):
    "200 views of one image from two workers: the workers must not repeat each other's draws"
    stream = make_dls().unlabeled_dl(same_image(50), bs=50, num_workers=2).stream()
    views = torch.cat([next(stream)[1] for _ in range(4)])
    stream.close()
    assert len({v.numpy().tobytes() for v in views}) > 190


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('n,mu', [(3, 2), (8, 2), (9, 2), (50, 1)])
def test_stream_visits_all_alike(make_dls, pool, n, mu, num_workers):
    dls = make_dls()
    loader = dls.unlabeled_dl(pool[:n], mu=mu, num_workers=num_workers)
    stream = loader.stream()
    idxs = torch.cat([next(stream)[2] for _ in range(n)])
    stream.close()
    assert len(idxs) == n * mu * 4, 'always full batches'
    assert torch.bincount(idxs).tolist() == [mu * 4] * n, 'each image equally often'
    finite = [b[2] for b in loader]
    assert sum(map(len, finite)) == (n // (mu * 4) * mu * 4 or n) and len(finite) == len(loader)
    assert len(torch.cat(finite).unique()) == sum(map(len, finite))


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_whole_fit_in_a_new_process(method, tmp_path):
    "Workers started either way, as on Linux and on Windows; afterwards none is left"
    script = tmp_path / 'run.py'
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing, warnings
        warnings.filterwarnings('ignore')
        import torch
        from fastai.vision.all import *
        from fixmatch_fastai.all import *

        def main():
            torch.multiprocessing.set_start_method('{method}')
            torch.set_num_threads(1)
            set_seed(0)
            files = get_image_files(digits_path()).sorted()
            labeled, rest = split_labeled(files, parent_label, 200)
            dls = ImageDataLoaders.from_path_func(digits_path(), labeled, parent_label, valid_pct=.5, img_cls=PILImageBW, bs=5, num_workers=0).repeat_train(3)
            loader = dls.unlabeled_dl(rest[:100], mu=2, num_workers=2, label_func=parent_label)
            model = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.Flatten(), nn.Linear(4*49, 10))
            learn = Learner(dls, model, cbs=FixMatch(loader, threshold=.1))
            with learn.no_bar(), learn.no_logging(): learn.fit(2)
            assert len(learn.fix_match.history) == 6
            print('children:', len(multiprocessing.active_children()))

        if __name__ == '__main__': main()
    """)
    )
    res = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert res.returncode == 0, res.stderr[-2000:]
    assert 'children: 0' in res.stdout


def test_label_func_of_unknown_classes(make_dls, pool):
    loader = make_dls().unlabeled_dl(pool, label_func=lambda o: parent_label(o) if parent_label(o) < '5' else 'what is this')
    y = torch.cat([b[1] for b in loader])
    assert set(y.tolist()) == {-1, 0, 1, 2, 3, 4}


def test_repeat_train_validates_and_predicts_as_before(make_dls, digits):
    short, long = make_dls(n_batches=None), make_dls(n_batches=7)
    assert (len(short.train), len(long.train)) == (5, 7)
    for a, b in zip(short.valid, long.valid):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    learn = Learner(long, tiny_net())
    assert len(learn.get_preds(ds_idx=0)[0]) == 20, 'each training image once'
    quiet_fit(learn, 1)
    learn.validate(ds_idx=0)
    assert learn.predict(digits[0])[0] in long.vocab


def test_repeat_train_keeps_weights(make_dls, digits):
    "A loader that draws by weight still does"
    dls = make_dls(n_batches=None)
    weighted = dls.train.new(cls=WeightedDL, wgts=[1.0] + [0.0] * 19)
    idxs = DataLoaders(weighted, dls.valid, device='cpu').repeat_train(4).train.get_idxs()
    assert list(idxs) == [0] * 16


def test_flip_stays_out_of_pool_images(make_dls, pool):
    "Random item transforms are for training images; the pool is opened as validation opens its images"
    dls = make_dls(item_tfms=FlipItem(p=1.0))
    loader = dls.unlabeled_dl(pool, tfm=FixMatchTransform(weak=lambda o: o, strong=lambda o: o), shuffle=False)
    weak, _, idxs = loader.one_batch()
    assert np.array_equal(weak[3, 0].numpy(), np.asarray(Image.open(pool[3])))
    assert idxs[:4].tolist() == [0, 1, 2, 3]


def test_dataframe_and_colour(digits, pool):
    df = pd.DataFrame(dict(name=[str(o) for o in digits[::90]], label=[parent_label(o) for o in digits[::90]]))
    dls = ImageDataLoaders.from_df(df, path='/', fn_col='name', label_col='label', bs=4, num_workers=0, item_tfms=Resize(20), seed=0, img_cls=PILImage)
    (weak, strong), y, idxs = dls.unlabeled_dl(df, mu=2, label_func=lambda row: row['label']).one_batch()
    assert weak.shape == strong.shape == (8, 3, 20, 20)
    known = [(dls.vocab[i], df.label.iloc[j]) for i, j in zip(y.tolist(), idxs.tolist()) if i >= 0]
    assert len(known) >= 5 and all(a == b for a, b in known)


def test_show_batch(make_dls, pool):
    dls = make_dls()
    for tfm in (None, FixMatchTransform(0.3, 0.3, weak=weak_augment(flip=False)), lambda o: (torch.rand(1, 16, 16),) * 2):
        plt.close('all')
        dls.unlabeled_dl(pool, tfm=tfm).show_batch(max_n=3)
        axs = plt.gcf().axes
        assert len(axs) == 6 and all(len(ax.images) == 1 for ax in axs) and axs[0].get_ylabel() == 'weak' and axs[3].get_ylabel() == 'strong'


def test_loader_shows_on_device_and_copies(make_dls, pool):
    loader = make_dls().unlabeled_dl(pool)
    weak, strong, idxs = loader.one_batch()
    assert weak.device == strong.device == idxs.device == torch.device('cpu')
    assert loader.new(bs=5).one_batch()[0].shape[0] == 5
    assert loader.mu == 7 and loader.new(bs=5).mu is None and loader.new().mu == 7


def test_fixmatch_uses_bs_given(make_dls, pool):
    dls = make_dls()
    learn = Learner(dls, tiny_net(), cbs=FixMatch(dls.unlabeled_dl(pool, bs=3, num_workers=0)))
    quiet_fit(learn, 1)
    assert learn.fix_match._recorder._steps[:, 6].tolist() == [3, 3, 3]
