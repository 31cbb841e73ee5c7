"Turned and painted-over images, and a body that moves from one network to another"

import gc
import pickle
import tracemalloc

import numpy as np
import pytest
import timm
import torch
from conftest import quiet_fit, tiny_net
from fastai.vision.all import (
    CategoryBlock,
    ConvLayer,
    DataBlock,
    DataLoaders,
    ImageBlock,
    IndexSplitter,
    Learner,
    Normalize,
    PILImage,
    PILImageBW,
    Resize,
    TensorImage,
    accuracy,
    aug_transforms,
    models,
    nn,
    resnet18,
    set_seed,
    unet_learner,
    vision_learner,
)
from PIL import Image

from fixmatch_fastai.ema import ModelEMA
from fixmatch_fastai.self_training import (
    inpainting_dls,
    inpainting_learner,
    inpainting_loss,
    load_body,
    rotation_dls,
    show_inpainting,
)


@pytest.fixture
def photos(tmp_path):
    "Twelve colourful photographs, 20 to 31 pixels wide and 24 high"
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (24, 20 + i, 3), dtype=np.uint8)).save(tmp_path / f'{i:02}.png')
    return sorted(tmp_path.glob('*.png'))


def photo_dls(photos, **kwargs):
    label, splitter = lambda o: 'ab'[int(o.stem) % 2], IndexSplitter(range(4))
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_y=label, splitter=splitter, **kwargs)
    return block.dataloaders(photos, bs=4, num_workers=0)


def as_uint8(img):
    return np.array(img)


def test_all_turns_of_each_image(make_dls, pool):
    dls = rotation_dls(pool, make_dls(), valid_pct=0.25)
    assert dls.vocab == [0, 90, 180, 270] and dls.c == 4
    assert (len(dls.train_ds), len(dls.valid_ds)) == (4 * 75, 4 * 25)
    for ds in (dls.train_ds, dls.valid_ds):
        for k in range(0, 40, 4):
            turned = [ds[k + j] for j in range(4)]
            assert [int(y) for _, y in turned] == [0, 1, 2, 3]
            upright = as_uint8(PILImageBW.create(pool[ds.items[k] // 4]))
            for j, (img, _) in enumerate(turned):
                assert type(img) is PILImageBW
                np.testing.assert_array_equal(as_uint8(img), np.rot90(upright, j))


def test_no_image_on_both_sides_and_the_seed_chooses(make_dls, pool):
    def sides(seed):
        dls = rotation_dls(pool, make_dls(), seed=seed)
        return [{k // 4 for k in ds.items} for ds in (dls.train_ds, dls.valid_ds)]

    train, valid = sides(0)
    assert not train & valid and train | valid == set(range(100)) and len(valid) == 20
    assert sides(0) == [train, valid] and sides(1) != [train, valid]


@pytest.mark.parametrize('make', [rotation_dls, inpainting_dls], ids=['rotation', 'inpainting'])
def test_validation_is_the_same_each_time(make_dls, pool, make):
    dls = make(pool, make_dls())
    a, b = (torch.cat([cast_all(x) for x in dls.valid]) for _ in range(2))
    assert torch.equal(a, b)
    assert not all(torch.equal(cast_all(x), cast_all(z)) for x, z in zip(dls.train, dls.train))


def cast_all(batch):
    return torch.cat([torch.Tensor(o.float()).flatten() for o in batch])


def test_resized_and_normalised_as_dls_does(photos):
    "Resize of items, size of presizing in batches, and Normalize; no random transform of training"
    normalize = Normalize.from_stats([0.2] * 3, [0.5] * 3, cuda=False)
    batch_tfms = [*aug_transforms(size=16, flip_vert=True), normalize]
    dls = photo_dls(photos, item_tfms=Resize(22), batch_tfms=batch_tfms)
    turned = rotation_dls(photos, dls, bs=8)
    x, y = turned.valid.one_batch()
    assert x.shape == (8, 3, 16, 16)
    views = dls.unlabeled_dl(photos).dataset
    expected = as_uint8(views.image(turned.valid_ds.items[0] // 4)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(x[0].numpy(), (expected - 0.2) / 0.5, atol=1e-5)
    flipped = rotation_dls(photos, dls, bs=8, batch_tfms=aug_transforms(do_flip=False))
    assert len(flipped.train.after_batch.fs) > len(turned.train.after_batch.fs)


def test_files_alone(photos):
    dls = rotation_dls(photos, size=16, bs=4)
    assert dls.one_batch()[0].shape == (4, 3, 16, 16)
    assert inpainting_dls(photos, size=16, bs=4).one_batch()[0].shape == (4, 3, 16, 16)
    quiet_fit(learn := Learner(dls, tiny_net(4, n_in=3), metrics=accuracy), 1)
    assert len(learn.recorder.values[0]) == 3


def test_not_square_is_cropped_to_its_middle(photos):
    dls = rotation_dls(photos[11:] + photos[11:], photo_dls(photos), bs=2)  # 31 wide, 24 high, and no Resize
    whole = as_uint8(PILImage.create(photos[11]))
    np.testing.assert_array_equal(as_uint8(dls.valid_ds[0][0]), whole[:, 3:27])
    assert dls.one_batch()[0].shape[-2:] == (24, 24)


def test_damaged_files_are_replaced(photos):
    "By the next that can be opened, in all turns alike"
    for i in (0, 3, 11):
        photos[i].write_bytes(b'no image')
    dls = rotation_dls(photos, size=16, bs=4, valid_pct=0.5)
    pictures = {k: as_uint8(ds[j][0]) for ds in (dls.train_ds, dls.valid_ds) for j, k in enumerate(ds.items)}
    assert len(pictures) == 48
    for i, other in ((0, 1), (3, 4), (11, 1)):
        for turn in range(4):
            np.testing.assert_array_equal(pictures[4 * i + turn], pictures[4 * other + turn])
    assert not np.array_equal(pictures[4], pictures[16])
    for p in photos:
        p.write_bytes(b'no image')
    with pytest.raises(ValueError, match='can be opened'):
        rotation_dls(photos, size=16)


@pytest.mark.parametrize('make', [rotation_dls, inpainting_dls], ids=['rotation', 'inpainting'])
def test_fewer_images_than_a_batch_still_train(photos, make):
    assert len(make(photos[:3], size=16).train) == 1


@pytest.mark.parametrize(
    'opts,exc,match',
    [
        (dict(items='folder', size=16), TypeError, 'get_image_files'),
        (dict(), ValueError, 'Give either `dls`'),
        (dict(dls=1, size=16), ValueError, 'Give either `dls`'),
        (dict(size=16, valid_pct=1.0), ValueError, '`valid_pct`'),
        (dict(items=[], size=16), ValueError, 'two or more images'),
    ],
)
@pytest.mark.parametrize('make', [rotation_dls, inpainting_dls], ids=['rotation', 'inpainting'])
def test_refuses_what_can_not_be_turned_or_hidden(photos, make, opts, exc, match):
    with pytest.raises(exc, match=match):
        make(**{'items': photos, **opts})


@pytest.mark.parametrize('make', [rotation_dls, inpainting_dls], ids=['rotation', 'inpainting'])
def test_refuses_loaders_of_torch(photos, make):
    loader = torch.utils.data.DataLoader([(torch.zeros(1, 4, 4), 0)])
    with pytest.raises(TypeError, match="fastai's DataLoaders with a validation set"):
        make(photos, DataLoaders(loader, loader))


def test_refuses_mask(photos):
    for mask in (0, 1, 1.5):
        with pytest.raises(ValueError, match='`mask`'):
            inpainting_dls(photos, size=16, mask=mask)


@pytest.mark.parametrize('mask,side', [(0.5, 8), (0.25, 4), (0.01, 1)])
def test_painted_over(make_dls, pool, mask, side):
    "One square, inside it the rounded mean of what is left, outside the image"
    dls = inpainting_dls(pool, make_dls(), mask=mask)
    places = set()
    for ds in (dls.train_ds, dls.valid_ds):
        for i in range(10):
            x, y, m = (np.array(o).astype(float) for o in ds[i])
            rows, cols = np.flatnonzero(m.any(1)), np.flatnonzero(m.any(0))
            assert m.sum() == side**2 and len(rows) == len(cols) == side and np.ptp(rows) == np.ptp(cols) == side - 1
            np.testing.assert_array_equal(x[m == 0], y[m == 0])
            assert set(x[m == 1]) == {y[m == 0].mean().round()}
            places.add((rows[0], cols[0]))
    assert len(places) > 5
    x, y, m = dls.one_batch()
    assert dls.n_inp == 1 and isinstance(x, TensorImage) and type(x) is type(y)
    assert m.shape == x[:, 0].shape and set(m.unique().tolist()) == {0, 1}


def test_colours_are_painted_with_their_means(photos):
    x, y, m = (np.array(o).astype(float) for o in inpainting_dls(photos, size=16).valid_ds[0])
    np.testing.assert_array_equal(x[m == 1][0], y[m == 0].mean(0).round())


def test_inpainting_loss():
    "Two channels, one hidden pixel in the first image, three in the second: (|1|+|-3| + 3·(2+0))/(4·2)"
    image, pred, mask = torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 2, dtype=torch.long)
    mask[0, 0, 1] = 1
    mask[1] = torch.tensor([[1, 1], [0, 1]])
    pred[0, :, 0, 1] = torch.tensor([1.0, -3.0])
    pred[1, 0] = 2.0
    pred[0, :, 1, 1] = 99  # not hidden
    assert inpainting_loss(pred, image, mask).item() == pytest.approx(10 / 8)
    assert inpainting_loss(pred, image, 0 * mask) == 0


def test_learners_train_and_are_pickled(make_dls, pool, tmp_path):
    turned = Learner(rotation_dls(pool, make_dls()), tiny_net(4), metrics=accuracy, path=tmp_path)
    quiet_fit(turned, 1)
    turned.export()
    painter = inpainting_learner(inpainting_dls(pool, make_dls()), body := two_convs()[:2], path=tmp_path, lr=1e-3)
    before = [p.clone() for p in body.parameters()]
    quiet_fit(painter, 1)
    assert all(torch.equal(p, q) for p, q in zip(body.parameters(), before)), 'a copy is trained'
    painter.export()
    show_inpainting(painter, 3)
    for dls in (turned.dls, painter.dls):
        assert pickle.loads(pickle.dumps(dls.train_ds)).__class__ is dls.train_ds.__class__


def test_workers_and_show_batch(make_dls, pool):
    for make in (rotation_dls, inpainting_dls):
        dls = make(pool[:20], make_dls(), bs=4, num_workers=1)
        assert sum(len(b[0]) for b in dls.valid) in (4, 16)
        dls.show_batch(max_n=2)


def test_picture_of_inpainting(make_dls, pool):
    "The second row is the true image but for the hidden square, and there it is what the network says"
    import matplotlib.pyplot as plt

    plt.close('all')
    dls = make_dls(batch_tfms=Normalize.from_stats([0.3], [0.33], cuda=False))
    painter = inpainting_learner(inpainting_dls(pool, dls), two_convs()[:2])
    show_inpainting(painter, 2)
    seen, filled, true = (plt.gcf().axes[k].images[0].get_array().squeeze() for k in (0, 2, 4))
    x, y, m = painter.dls.valid.one_batch()
    m = m[0].numpy()
    with torch.no_grad():
        pred = painter.model.eval()(x[:2])[0, 0].numpy() * 0.33 + 0.3
    np.testing.assert_allclose(true, y[0, 0].numpy() * 0.33 + 0.3, atol=1e-5)
    np.testing.assert_allclose(seen[m == 0], true[m == 0], atol=1e-5)
    np.testing.assert_allclose(filled[m == 0], true[m == 0], atol=1e-5)
    np.testing.assert_allclose(filled[m == 1], pred[m == 1].clip(0, 1), atol=1e-4)


def two_convs(n_out=10, n_in=1):
    convs = ConvLayer(n_in, 8, stride=2), ConvLayer(8, 16, stride=2)
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, n_out))


def stir(model):
    "Numbers everywhere that nobody else has, batch norm's statistics too"
    set_seed(3)
    for t in model.state_dict().values():
        t.copy_(torch.randint(1, 1000, t.shape).to(t.dtype))
    return model


def states(m):
    return {k: v.clone() for k, v in m.state_dict().items()}


def same(a, b):
    a, b = list(a.values()), list(b.values())
    return len(a) == len(b) > 0 and all(torch.equal(s, t) for s, t in zip(a, b))


@pytest.fixture
def colour_dls(photos):
    return photo_dls(photos, item_tfms=Resize(32))


def plain(dls, model):
    return Learner(dls, model, metrics=accuracy)


def vision(dls, arch, **kwargs):
    return vision_learner(dls, arch, pretrained=False, **kwargs)


def timm_raw(n_out):
    return timm.create_model('resnet10t', num_classes=n_out)


def without_fc(model):
    return nn.ModuleList([m for n, m in model.named_children() if n != 'fc'])


def pairs(dls):
    "Source, target, and the bodies of both by hand"
    src, dst = stir(two_convs(4)), plain(dls, two_convs(2, 1))
    yield 'plain', src, dst, src[:2], dst.model[:2]
    src, dst = stir(tiny_net(4)), plain(dls, tiny_net(2))
    yield 'one convolution', plain(dls, src), dst, src[:1], dst.model[:1]
    src, dst = vision(dls, resnet18, n_out=4), vision(dls, resnet18)
    yield 'vision_learner', src, dst, stir(src.model)[0], dst.model[0]
    src, dst = unet_learner(dls, resnet18, pretrained=False, n_out=3, loss_func=inpainting_loss), vision(dls, resnet18)
    yield 'unet_learner', src, dst, stir(src.model).layers[0], dst.model[0]
    src, dst = stir(models.resnet18(num_classes=4)), vision(dls, resnet18)
    yield 'torchvision', src, dst, nn.Sequential(*list(src.children())[:-2]), dst.model[0]
    src, dst = vision(dls, 'resnet10t', n_out=4), vision(dls, 'resnet10t')
    yield 'timm', src, dst, stir(src.model)[0], dst.model[0]
    src, dst = stir(timm_raw(4)), plain(dls, timm_raw(2))
    yield (
        'timm alone',
        src,
        dst,
        without_fc(src),
        without_fc(dst.model),
    )
    src, dst = stir(timm_raw(4)), vision(dls, 'resnet10t')
    yield 'timm to fastai', src, dst, without_fc(src), dst.model[0].model
    head = nn.Sequential(nn.Flatten(), nn.Linear(512, 4))
    src, dst = vision(dls, resnet18, n_out=4, custom_head=head), vision(dls, resnet18)
    yield 'a head without pooling', src, dst, stir(src.model)[0], dst.model[0]
    vit = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    src, net = (timm.models.VisionTransformer(num_classes=n, **vit) for n in (4, 2))
    src, dst = stir(src), plain(dls, net)
    for m in (src, dst.model):
        m.default_cfg = {'classifier': 'head'}
    yield (
        'transformer',
        src,
        dst,
        nn.ModuleList([src.patch_embed, src.blocks, src.norm]),
        nn.ModuleList([dst.model.patch_embed, dst.model.blocks, dst.model.norm]),
    )


@pytest.mark.slow
def test_bodies_of_all_kinds_are_taken_over(colour_dls):
    for name, src, dst, theirs, ours in pairs(colour_dls):
        body = {t.data_ptr() for t in ours.state_dict().values()}
        head = {n: t.clone() for n, t in dst.model.state_dict().items() if t.data_ptr() not in body}
        before = states(src.model if isinstance(src, Learner) else src)
        assert not same(theirs.state_dict(), ours.state_dict()), name
        n = load_body(dst, src)
        assert n >= len(theirs.state_dict()) and same(theirs.state_dict(), ours.state_dict()), name
        after = dst.model.state_dict()
        if name != 'transformer':  # where the class token and positions belong to the body as well
            assert n == len(theirs.state_dict()), name
            assert head and all(torch.equal(t, after[k]) for k, t in head.items()), f'{name}: the head stays'
        assert same(before, (src.model if isinstance(src, Learner) else src).state_dict()), name


def test_a_deeper_body_is_taken_in_part_or_refused():
    def convs(*widths):
        sizes = list(zip((1, *widths), widths))
        layers = [nn.Conv2d(a, b, 3) for a, b in sizes]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 2))

    learn = Learner(DataLoaders([], []), convs(4, 8), loss_func=nn.MSELoss())
    with pytest.warns(UserWarning, match='Of 6 tensors of the pretrained body 2 have no place'):
        assert load_body(learn, convs(4, 8, 4)) == 4
    with pytest.raises(ValueError, match='The pretrained body is a larger one: of its 8 tensors 4 have no place'):
        load_body(learn, convs(4, 8, 16, 32))
    net = convs(4, 8)
    before = states(net)
    with pytest.raises(TypeError, match='give the Learner first'):
        load_body(net, learn)
    assert same(before, net.state_dict())


@pytest.mark.slow
def test_inpainting_with_an_architecture(colour_dls, photos):
    painter = inpainting_learner(inpainting_dls(photos, colour_dls, bs=4), resnet18)
    quiet_fit(painter, 1)
    learn = vision(colour_dls, resnet18)
    assert load_body(learn, painter) == len(learn.model[0].state_dict())
    assert same(learn.model[0].state_dict(), painter.model.layers[0].state_dict())
    with pytest.raises(TypeError, match='`body` must be'):
        inpainting_learner(painter.dls, 'resnet18')
    with pytest.raises(ValueError, match='`body` must return feature maps .* leave out pooling and head'):
        inpainting_learner(painter.dls, nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(TypeError, match='must be an `nn.Sequential`'):
        inpainting_learner(painter.dls, timm.create_model('resnet10t', num_classes=0, global_pool=''))
    with pytest.raises(ValueError, match="can't take images of 3 channels"):
        inpainting_learner(painter.dls, two_convs()[:2])
    with pytest.raises(ValueError, match='as `inpainting_learner` makes it'):
        show_inpainting(Learner(colour_dls, nn.Flatten(), loss_func=nn.MSELoss()))


def test_moved_body_trains_with_fixmatch(make_learner, make_dls, pool):
    pretrained = plain(rotation_dls(pool, make_dls()), tiny_net(4))
    quiet_fit(pretrained, 1)
    learn = make_learner()
    quiet_fit(learn, 1)
    assert load_body(learn, pretrained) == 6
    quiet_fit(learn, 1)
    assert len(learn.fix_match.history) == 3


def test_average_begins_anew(make_learner):
    learn = make_learner(cbs=[ModelEMA(half_life=1)])
    quiet_fit(learn, 1)
    src = tiny_net(4)
    load_body(learn, src)
    learn.validate()
    assert torch.equal(learn.model[0][0].weight, src[0][0].weight), 'the old average must not come back'


def test_optimizer_forgets_and_stays_frozen(colour_dls):
    learn = vision(colour_dls, resnet18)
    learn.freeze()
    quiet_fit(learn, 1)
    old, frozen = learn.opt, [p.requires_grad for p in learn.model.parameters()]
    load_body(learn, vision(colour_dls, resnet18, n_out=4))
    assert learn.opt is not old and learn.opt.frozen_idx == old.frozen_idx > 0
    assert [p.requires_grad for p in learn.model.parameters()] == frozen
    assert not any('grad_avg' in s for s in learn.opt.state.values())
    before = states(learn.model[1])
    quiet_fit(learn, 1)
    assert not same(before, learn.model[1].state_dict())
    fresh = vision(colour_dls, resnet18)
    load_body(fresh, learn)
    assert fresh.opt is None


def test_a_part_that_fits_is_taken_with_a_warning(make_dls):
    "Grey to colour: the first convolution does not fit, the second, which is larger, does"
    learn, src = plain(make_dls(), two_convs()), stir(two_convs(4, n_in=3))
    first = learn.model[0][0].weight.clone()
    with pytest.warns(UserWarning, match='Of 12 tensors of the body 1 don.t fit .* such as 0.0.weight'):
        assert load_body(learn, src) == 11
    assert torch.equal(learn.model[0][0].weight, first) and torch.equal(learn.model[1][0].weight, src[1][0].weight)


@pytest.mark.parametrize(
    'src,match',
    [
        (
            nn.Sequential(ConvLayer(1, 9), ConvLayer(9, 9), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4)),
            r'0.0.weight of shape \(8, 1, 3, 3\), which is \(9, 1, 3, 3\) there',
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), 'which is not there'),
    ],
    ids=['width', 'no convolution'],
)
def test_refuses_a_body_that_does_not_fit(make_dls, src, match):
    learn = plain(make_dls(), two_convs())
    learn.create_opt()
    before, opt = states(learn.model), learn.opt
    with pytest.raises(ValueError, match=match):
        load_body(learn, src)
    assert same(before, learn.model.state_dict()) and learn.opt is opt
    with pytest.raises(ValueError, match='it has no convolution'):
        load_body(plain(make_dls(), nn.Sequential(nn.Flatten(), nn.Linear(256, 10))), two_convs())
    with pytest.raises(TypeError, match='must be a Learner or a model'):
        load_body(learn, 'weights.pth')


@pytest.mark.parametrize('make', [rotation_dls, inpainting_dls])
def test_bytes_for_each_image(make, pool):
    "Beside the list of the images: for its number, in four turns too, and for fastai's own list"
    items = [*pool[:1]] * 20_000
    gc.collect()
    tracemalloc.start()
    dls = make(items, size=16, num_workers=0)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 32 * len(items) and peak < 64 * len(items), f'{kept} and {peak} bytes'
    assert len(dls.train_ds) + len(dls.valid_ds) == len(items) * (4 if make is rotation_dls else 1)
