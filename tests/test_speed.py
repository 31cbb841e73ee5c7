"What makes training fast: images kept in memory, and views made on the device"

import pickle

import numpy as np
import pytest
import torch
from conftest import quiet_fit
from fastai.vision.all import PILImage, Resize, Transform, parent_label
from PIL import Image

import fixmatch_fastai.data as data
from fixmatch_fastai.all import FixMatchBatchTransform, FixMatchTransform, UnlabeledDL, fixmatch_check, weak_augment

WEAK = weak_augment(flip=False)


def plain(img):
    "The image itself, twice"
    t = torch.from_numpy(np.array(img))
    t = t[None] if t.ndim == 2 else t.permute(2, 0, 1)
    return t, t


class Opened(Transform):
    "Counts what is opened"

    def __init__(self, n):
        self.n = n

    def encodes(self, o: Image.Image):
        self.n += 1
        return o


def take(loader, n, dls=None):
    stream = loader.stream(dls)
    try:
        return [next(stream) for _ in range(n)]
    finally:
        stream.close()


# --- cache -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('img_cls', [PILImage, None], ids=['RGB', 'L'])
def test_cached_images_are_the_images(make_dls, pool, num_workers, img_cls):
    dls = make_dls(item_tfms=Resize(20), **(dict(img_cls=img_cls) if img_cls else {}))
    without, cached = (dls.unlabeled_dl(pool, tfm=plain, bs=50, shuffle=False, num_workers=num_workers, cache=c) for c in (False, True))
    expected = take(without, 2)
    for _ in range(2):  # filled in the first pass, read in the second
        for a, b in zip(expected, take(cached, 2), strict=True):
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_each_image_is_opened_once(make_dls, pool):
    opened = Opened(0)
    dls = make_dls(item_tfms=opened)
    loader = dls.unlabeled_dl(pool, bs=50, cache=True)
    opened.n = 0
    take(loader, 2)
    assert opened.n in (len(pool), len(pool) - 1), 'one was looked at for its size'
    before = opened.n
    take(loader, 6)
    take(loader, 2, dls)
    assert opened.n - before <= 1, 'a stream looks at one image to learn the size'


def test_workers_share_what_they_open(make_dls, pool):
    loader = make_dls().unlabeled_dl(pool, tfm=plain, bs=50, num_workers=2, cache=True)
    take(loader, 4)
    (cache, _), *others = loader.dataset._caches.values()
    assert not others and cache.kept.all() and cache.images.is_shared()
    assert torch.equal(cache.images[3], torch.from_numpy(np.array(Image.open(pool[3]))))


def test_without_workers_nothing_is_shared(make_dls, pool):
    loader = make_dls().unlabeled_dl(pool, cache=True)
    (cache, _), *_ = loader.dataset._caches.values()
    assert not cache.images.is_shared()


def test_progressive_resizing(make_dls, pool):
    "Another size is another cache, and the old one is let go"
    small, large = make_dls(), make_dls(item_tfms=Resize(24))
    loader = small.unlabeled_dl(pool, bs=20, cache=True)
    assert take(loader, 1)[0][0].shape[-1] == 16
    assert take(loader, 1, large)[0][0].shape[-1] == 24
    assert [c.images.shape[1:] for c, _ in loader.dataset._caches.values()] == [(24, 24)]
    assert take(loader, 1)[0][0].shape[-1] == 16, 'opened anew, or cached anew'
    assert take(loader, 1, small)[0][0].shape[-1] == 16


@pytest.mark.parametrize('num_workers', [0, 2])
def test_damaged_images_beside_a_cache(make_dls, pool, tmp_path, num_workers):
    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'no image')
    loader = make_dls().unlabeled_dl([*pool[:20], bad], bs=21, num_workers=num_workers, cache=True)
    for batch in take(loader, 3):
        assert len(batch[0]) == 21 and 20 not in batch[2]
    assert list(loader.damaged.index) == [20]


def test_images_of_several_shapes(make_dls):
    mixed = [np.zeros((s, s), dtype=np.uint8) for s in (16, 18)] * 4
    loader = make_dls().unlabeled_dl(mixed, bs=8, cache=True)
    with pytest.raises(ValueError, match='differ in shape'):
        take(loader, 1)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_what_does_not_fit_is_refused(make_dls, pool, monkeypatch, num_workers):
    monkeypatch.setattr(data, '_free_memory', lambda shared: 25_599)
    with pytest.raises(ValueError, match=r'100 images of 16×16 pixels take 2.56e-05 GB.*leave out `cache=True`'):
        make_dls().unlabeled_dl(pool, num_workers=num_workers, cache=True)
    monkeypatch.setattr(data, '_free_memory', lambda shared: 25_600)
    make_dls().unlabeled_dl(pool, num_workers=num_workers, cache=True)


def test_free_memory():
    assert 0 < data._free_memory(True) <= data._free_memory(False) * 1.1


def test_cached_loader_travels(make_dls, pool):
    "As to a worker process that is not forked"
    loader = make_dls().unlabeled_dl(pool, tfm=plain, bs=100, shuffle=False, cache=True)
    expected = take(loader, 1)[0]
    again = pickle.loads(pickle.dumps(loader.dataset))
    assert torch.equal(again[5][0], expected[0][5])


def test_training_with_a_cache(make_learner, make_dls, pool):
    dls = make_dls()
    learn = make_learner(dls=dls, loader=dls.unlabeled_dl(pool, mu=2, tfm=FixMatchTransform(weak=WEAK), label_func=parent_label, num_workers=2, cache=True))
    quiet_fit(learn, 2)
    quiet_fit(learn, 1)
    assert len(learn.fix_match.history) == 3 and learn.fix_match.history.loss_u.notna().all()
    learn.export()
    assert (learn.path / 'export.pkl').stat().st_size < 200_000


# --- views of batches --------------------------------------------------------------------------------------------------------------------


class Halves:
    "Not ours: views of a whole batch, marked as such"

    takes_batches = True

    def __call__(self, x):
        self.seen = x
        return x // 2, x // 4


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('cache', [False, True])
def test_batches_of_views(make_dls, pool, num_workers, cache):
    loader = make_dls().unlabeled_dl(pool, tfm=Halves(), bs=50, shuffle=False, num_workers=num_workers, cache=cache)
    weak, strong, idxs = take(loader, 1)[0]
    img = torch.stack([torch.from_numpy(np.array(Image.open(o)))[None] for o in pool[:50]])
    assert torch.equal(weak, img // 2) and torch.equal(strong, img // 4) and torch.equal(idxs, torch.arange(50))
    weak, strong, idxs = next(iter(loader))
    assert torch.equal(weak, img // 2) and torch.equal(strong, img // 4)


def test_truth_beside_views_of_batches(make_dls, pool):
    loader = make_dls().unlabeled_dl(pool, tfm=Halves(), bs=50, shuffle=False, label_func=parent_label)
    for (weak, strong), y, idxs in (take(loader, 1)[0], next(iter(loader))):
        assert weak.shape == strong.shape == (50, 1, 16, 16)
        assert y.tolist() == [int(o.parent.name) for o in pool[:50]] and idxs.tolist() == list(range(50))
    loader.show_batch(max_n=3)


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('forward', ['joint', 'selective'])
def test_training_with_views_of_batches(make_dls, make_learner, pool, num_workers, forward):
    dls = make_dls()
    loader = dls.unlabeled_dl(pool, mu=2, tfm=FixMatchBatchTransform(weak=WEAK), label_func=parent_label, num_workers=num_workers, cache=True)
    assert isinstance(loader, UnlabeledDL)
    learn = make_learner(dls=dls, loader=loader, fixmatch=dict(forward=forward))
    assert 'stops' not in str(fixmatch_check(learn))
    quiet_fit(learn, 2)
    assert len(learn.fix_match.history) == 6 and learn.fix_match.history.loss_u.notna().all()
    learn.fix_match.show_pseudo_labels(4)
    learn.export()


def test_same_seed_same_views(make_dls, pool):
    loader = make_dls().unlabeled_dl(pool, tfm=FixMatchBatchTransform(weak=WEAK), bs=20, shuffle=False)

    def views(seed):
        torch.manual_seed(seed)
        return take(loader, 1)[0]

    assert torch.equal(views(1)[1], views(1)[1]) and not torch.equal(views(1)[1], views(2)[1])


def test_damaged_images_in_batches(make_dls, pool, tmp_path):
    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'no image')
    loader = make_dls().unlabeled_dl([*pool[:20], bad], tfm=FixMatchBatchTransform(), bs=21)
    assert all(len(b[0]) == 21 and 20 not in b[2] for b in take(loader, 2))


def test_images_of_several_shapes_in_batches(make_dls):
    mixed = [np.zeros((s, s), dtype=np.uint8) for s in (16, 18)] * 4
    with pytest.raises(ValueError, match='differ in shape'):
        take(make_dls().unlabeled_dl(mixed, bs=8, tfm=FixMatchBatchTransform()), 1)
