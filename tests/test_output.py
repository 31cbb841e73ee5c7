"Tables, lines and pictures of a run: whole, or as they were"

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import quiet_fit
from fastai.vision.all import Callback

from fixmatch_fastai.experiment.output import EpochTable, logged_lines, save_figure, save_text


class From(Callback):
    "Another epoch than fastai's"

    def __init__(self, number):
        self.number = number

    def before_epoch(self):
        self.learn.epoch = self.number


def test_epochs_are_counted_through_fits(make_learner, tmp_path):
    file = tmp_path / 'history.csv'
    learn = make_learner(cbs=[EpochTable(file, resume=False)])
    quiet_fit(learn, 1)
    quiet_fit(learn, 2)
    rows = pd.read_csv(file)
    assert rows.epoch.tolist() == [0, 1, 2] and list(rows)[:3] == ['epoch', 'train_loss', 'valid_loss']
    assert rows.accuracy.iloc[-1] == pytest.approx(learn.recorder.values[-1][2])


def test_rows_of_a_resumed_fit(make_learner, tmp_path):
    "What is trained again replaces its row, and those after it"
    file = tmp_path / 'history.csv'
    file.write_text('epoch,accuracy\n0,7\n1,8\n2,9\n')

    quiet_fit(make_learner(), 1, cbs=[EpochTable(file, resume=True), From(1)])
    rows = pd.read_csv(file)
    assert rows.epoch.tolist() == [0, 1] and rows.accuracy[0] == 7 and rows.accuracy[1] < 1
    quiet_fit(make_learner(), 1, cbs=EpochTable(file, resume=False))
    assert pd.read_csv(file).epoch.tolist() == [0]


TABLE = 'epoch,train_loss,accuracy,time\n0,-1.5,0.25,00:01\n1,,0.30000000000000004,00:01\n'
DAMAGED = {
    'empty': '',
    'no table': '{}',
    'binary': b'\xff\xfe\x00',
    'cut short': TABLE[:-8],
    'cut within a number': TABLE[:50],
    'no epoch': TABLE.replace('epoch', 'step'),
    'a row is missing': TABLE.replace('1,,', '2,,'),
    'twice': TABLE.replace('1,,', '0,,'),
    'no epoch in a row': TABLE.replace('1,,', ',,'),
    'words': TABLE.replace('0.25', 'abc'),
    'zeros': TABLE.encode() + bytes(20) + b'\n',
    'no rows': TABLE[: TABLE.index('\n') + 1],
    'a cell too many': TABLE + '2,1,1,1,1,1\n',
}


@pytest.mark.parametrize('text', DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_refused_and_kept(make_learner, tmp_path, text):
    file, text = tmp_path / 'history.csv', text if isinstance(text, bytes) else text.encode()
    file.write_bytes(text)
    with pytest.raises(ValueError, match=r'history\.csv is damaged: mend it, or delete it to go on without its rows\.'):
        quiet_fit(make_learner(), 1, cbs=EpochTable(file, resume=True))
    assert file.read_bytes() == text


def test_rows_stay_as_they_were(make_learner, tmp_path):
    "Negative numbers too, and what is no number"
    file = tmp_path / 'history.csv'
    file.write_text(TABLE)
    quiet_fit(make_learner(), 1, cbs=[EpochTable(file, resume=True), From(2)])
    assert [o.rstrip(',') for o in file.read_text().splitlines()[1:3]] == TABLE.splitlines()[1:]
    with pytest.warns(UserWarning, match='lacks 3 of the epochs that were trained before'):
        quiet_fit(make_learner(), 1, cbs=[EpochTable(tmp_path / 'new.csv', resume=True), From(3)])


def test_lines_in_a_log(make_learner, capsys):
    learn = make_learner()
    before = learn.logger
    with logged_lines(learn) as cbs:
        learn.fit(2, cbs=cbs)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'step 1 of 6' and lines[-2] == 'step 6 of 6'
    assert [o.split(',')[0] for o in lines if o.startswith('epoch')] == ['epoch 0', 'epoch 1']
    assert f'accuracy {learn.recorder.values[-1][2]:.4f}' in lines[-1] and learn.logger is before


def test_files_are_whole_or_as_they_were(tmp_path):
    save_text('old caf\udce9', tmp_path / 'a')

    class Stopped:
        def savefig(self, file, **kwargs):
            file.write_text('half')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_figure(Stopped(), tmp_path / 'a')
    assert (tmp_path / 'a').read_text() == 'old caf\\udce9' and len(list(tmp_path.iterdir())) == 1


def test_figures_are_closed(tmp_path):
    before = plt.get_fignums()
    save_figure(plt.subplots()[0], tmp_path / 'a.png')
    assert (tmp_path / 'a.png').stat().st_size > 1000 and plt.get_fignums() == before
