"Losses, a block and a metric for soft labels"

import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, PILImageBW, parent_label

from fixmatch_fastai.self_training import (
    DistillationLoss,
    LogitsMSELoss,
    SoftBCELoss,
    SoftCategoryBlock,
    SoftCrossEntropyLoss,
    SoftFocalLoss,
    soft_accuracy,
)
from fixmatch_fastai.self_training.soft_labels import SoftCategorize, SoftLabel

LOSSES = [SoftCrossEntropyLoss, DistillationLoss, SoftFocalLoss, SoftBCELoss]


@pytest.mark.parametrize('cls', [*LOSSES, LogitsMSELoss])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_losses_have_a_row_for_each_image(cls, dtype):
    torch.manual_seed(0)
    pred = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    targ = torch.randn(6, 4) if cls is LogitsMSELoss else torch.randn(6, 4).softmax(1)
    rows = cls(reduction='none')(pred, targ)
    assert rows.shape == (6,) and rows.dtype == torch.float32 and (rows >= 0).all()
    torch.testing.assert_close(cls()(pred, targ), rows.mean())
    torch.testing.assert_close(cls(reduction='sum')(pred, targ), rows.sum())
    cls()(pred, targ).backward()
    assert pred.grad.isfinite().all() and pred.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none'"):
        cls(reduction='max')


def test_losses_by_hand():
    "Logits (log 3, 0), so probabilities of 3/4 and 1/4, and a target of (1/2, 1/2)"
    pred, targ = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[0.5, 0.5]])
    log = torch.tensor([0.75, 0.25]).log()
    torch.testing.assert_close(SoftCrossEntropyLoss()(pred, targ), -log.mean())
    torch.testing.assert_close(DistillationLoss(1)(pred, targ), -log.mean() - torch.tensor(2.0).log())
    focal = -(0.5 * 0.25**2 * log[0] + 0.5 * 0.75**2 * log[1])
    torch.testing.assert_close(SoftFocalLoss(2)(pred, targ), focal)
    torch.testing.assert_close(SoftFocalLoss(0)(pred, targ), -log.mean())
    torch.testing.assert_close(SoftBCELoss()(pred, targ), F.binary_cross_entropy_with_logits(pred, targ))
    torch.testing.assert_close(LogitsMSELoss()(pred, torch.zeros(1, 2)), torch.tensor(3.0).log() ** 2 / 2)


def test_temperature_is_that_of_the_teachers_logits():
    "Softened probabilities are the softmax of the logits over T; the loss is 0 where both agree"
    logits = torch.tensor([[3.0, 1.0, -2.0]])
    same = DistillationLoss(T=2)(logits, logits.softmax(1))
    assert same.item() == pytest.approx(0, abs=1e-6)
    other = torch.tensor([[0.0, 1.0, 2.0]])
    soft = (logits / 2).softmax(1)
    by_hand = 4 * (soft * (soft.log() - (other / 2).log_softmax(1))).sum()
    torch.testing.assert_close(DistillationLoss(T=2)(other, logits.softmax(1)), by_hand)


@pytest.mark.parametrize(
    'make,match',
    [
        (lambda: DistillationLoss(0), '`T` is a temperature, above 0, but got 0'),
        (lambda: SoftFocalLoss(-1), '`gamma` must be 0 or more, but got -1'),
        (lambda: SoftBCELoss(2), '`thresh` is a probability, 0 to 1, but got 2'),
    ],
)
def test_refused_options_of_losses(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize('cls', LOSSES)
def test_probabilities_of_0_and_1_are_finite(cls):
    pred = torch.tensor([[100.0, 0, -100], [0, 0, 0]], requires_grad=True)
    loss = cls()(pred, torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    loss.backward()
    assert loss.isfinite() and pred.grad.isfinite().all()


WRONG = [(o, 0.25, 0.7) for o in LOSSES[:3]] + [(SoftBCELoss, 0.7, 2.0), (LogitsMSELoss, 3.0, 0.25)]


@pytest.mark.parametrize('cls,good,bad', WRONG)
def test_on_a_device_only_the_first_batch_is_looked_at(cls, good, bad):
    "`meta` tensors have no values: to look at them is an error, as on a GPU it is a wait"
    pred, loss = torch.randn(2, 4), cls()
    with pytest.raises(RuntimeError):
        loss(pred.to('meta'), torch.empty(2, 4, device='meta'))
    with pytest.raises(ValueError, match='but the target has rows like'):
        loss(pred, torch.full((2, 4), bad))
    loss(pred, torch.full((2, 4), good))
    assert loss(pred.to('meta'), torch.empty(2, 4, device='meta')).shape == ()
    with pytest.raises(ValueError, match='but the target has rows like'):
        loss(pred, torch.full((2, 4), bad))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r'needs logits \(images, classes\), but the model returned \(2, 3, 4\)'):
        SoftCrossEntropyLoss()(torch.zeros(2, 3, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r'logits \(2, 3\), or class numbers \(2,\), but the target is \(2, 2\)'):
        SoftCrossEntropyLoss()(torch.zeros(2, 3), torch.full((2, 2), 0.5))


def test_accuracy_of_soft_targets_by_hand():
    "The student's likeliest classes are 1, 0 and 1, the target's are 1 in all"
    pred = torch.tensor([[1.0, 2], [3, 0], [1, 2]])
    for targ in (torch.tensor([[0.4, 0.6], [0.3, 0.7], [0.1, 0.9]]), torch.tensor([1, 1, 1])):
        assert soft_accuracy(pred, targ).item() == pytest.approx(2 / 3)
    assert soft_accuracy(pred, torch.tensor([1, 1, 1])).shape == ()


def test_soft_labels_go_by_the_names_of_classes():
    "With the classes in another order they are put right; with others they are refused"
    label = SoftLabel(zip('0123', (0.1, 0.2, 0.3, 0.4)))
    for vocab in (['3', '2', '1', '0'], ['0', '1', '2', '3'], [3, 0, 2, 1]):
        assert SoftCategorize(vocab).encodes(label).tolist() == pytest.approx([label[str(o)] for o in vocab])
    with pytest.raises(ValueError, match='give it the classes of the teacher'):
        SoftCategorize(['0', '1', '2', 'x']).encodes(label)
    with pytest.raises(ValueError, match="'x' is not among the classes '0', '1', '2', '3', '4' ...: give"):
        SoftCategorize([*'012345']).encodes('x')
    with pytest.raises(ValueError, match='for each of the 4 classes, but has 3'):
        SoftCategorize([*'0123']).encodes(torch.ones(3))


def test_a_block_of_vectors_and_numbers(pool):
    "Vectors in training, class numbers in validation, and names again where they are shown"
    block = DataBlock(
        (ImageBlock(PILImageBW), SoftCategoryBlock([*'0123456789'])),
        get_y=parent_label,
        splitter=IndexSplitter(range(20)),
    )
    dls = block.dataloaders(list(pool), bs=8, num_workers=0)
    x, y = dls.one_batch()
    assert y.shape == (8, 10) and y.dtype == torch.float32 and (y.sum(1) == 1).all()
    assert type(dls.loss_func) is SoftCrossEntropyLoss
    x, y = dls.valid.one_batch()
    assert [dls.vocab[int(i)] for i in y] == [parent_label(o) for o in pool[:8]]
    assert dls.decode_batch((x, y))[0][1] == parent_label(pool[0])


def test_soft_labels_need_their_block(pool):
    label = SoftLabel(a=0.3, b=0.7)
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=lambda o: label)
    with pytest.raises(TypeError, match=r'needs `SoftCategoryBlock\(learn.dls.vocab\)`'):
        block.dataloaders(list(pool), num_workers=0)
