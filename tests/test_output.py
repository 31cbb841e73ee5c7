"Tables, lines and pictures of a run: whole, or as they were"

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import quiet_fit
from fastai.vision.all import Callback

from fixmatch_fastai.experiment.output import EpochTable, logged_lines, save_figure, save_text


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

    class FromTheSecond(Callback):
        def before_epoch(self):
            self.learn.epoch = 1

    quiet_fit(make_learner(), 1, cbs=[EpochTable(file, resume=True), FromTheSecond()])
    rows = pd.read_csv(file)
    assert rows.epoch.tolist() == [0, 1] and rows.accuracy[0] == 7 and rows.accuracy[1] < 1
    quiet_fit(make_learner(), 1, cbs=EpochTable(file, resume=False))
    assert pd.read_csv(file).epoch.tolist() == [0]


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
