"What MLflow gets of a fit: in a database, and, in few tests, on a real server"

import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import warnings

import pandas as pd
import pytest
from conftest import quiet_fit
from fastai.vision.all import Callback, CancelFitException, load_learner

from fixmatch_fastai.all import FreeMatch, ModelEMA, SaveFixMatch
from fixmatch_fastai.experiment.tracking import MLflowCallback

os.environ |= {
    'MLFLOW_DISABLE_TELEMETRY': 'true',
    'DO_NOT_TRACK': 'true',
    'MLFLOW_SERVER_ENABLE_JOB_EXECUTION': 'false',
}
mlflow = pytest.importorskip('mlflow', reason='mlflow is not installed')


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)


@pytest.fixture(scope='module')
def uri(tmp_path_factory):
    "A database for all tests: each has its own experiment"
    uri = f'sqlite:///{tmp_path_factory.mktemp("mlflow")}/mlflow.db'
    mlflow.MlflowClient(uri).search_experiments()  # makes its tables, which takes seconds
    return uri


@pytest.fixture
def client(uri):
    return mlflow.MlflowClient(uri)


@pytest.fixture
def tracker(uri, request):
    return lambda **kwargs: MLflowCallback(**{'experiment': request.node.name, 'tracking_uri': uri, **kwargs})


@pytest.fixture
def runs(client, request):
    "The runs of this test"

    def found():
        experiment = client.get_experiment_by_name(request.node.name)
        return [] if experiment is None else client.search_runs([experiment.experiment_id])

    return found


def values(client, run_id, name):
    return [o.value for o in client.get_metric_history(run_id, name)]


def steps(client, run_id, name='step/train_loss'):
    return [o.step for o in client.get_metric_history(run_id, name)]


class Stop(Callback):
    "Ctrl-C, or an error, in the batch with this number"

    order, run_valid = 75, False

    def __init__(self, at, error=KeyboardInterrupt):
        self.at, self.error = at, error

    def after_batch(self):
        if self.train_iter == self.at:
            raise self.error('stopped here')


def stopped_fit(learn, n, *cbs, error=KeyboardInterrupt):
    "A fit that ends in its fifth step"
    try:
        quiet_fit(learn, n, cbs=[*cbs, Stop(5, error)])
    except (KeyboardInterrupt, ZeroDivisionError) as e:
        assert isinstance(e, error)


def check_everything(client, cb, learn):
    "Parameters, each step and each epoch of a fit of two epochs of three steps"
    run = client.get_run(cb.run_id)
    assert (run.info.status, run.info.run_name) == ('FINISHED', 'first') and run.info.end_time
    expected = dict(colour='red', epochs='2', steps='6', bs='4', ema_decay='0.5')
    expected |= {'fixmatch.policy': 'FixedThreshold(threshold=0.2, T=1.0)', 'fixmatch.unlabeled_images': '100'}
    assert {k: run.data.params.get(k) for k in expected} == expected
    history = learn.fix_match.history
    for name in ('loss_x', 'loss_u', 'mask_rate'):
        assert values(client, cb.run_id, f'step/{name}') == pytest.approx(history[name].tolist())
        assert steps(client, cb.run_id, f'step/{name}') == [1, 2, 3, 4, 5, 6]
    assert values(client, cb.run_id, 'step/pseudo_acc') == pytest.approx(history.pseudo_acc.dropna().tolist())
    assert values(client, cb.run_id, 'step/lr') == pytest.approx(learn.recorder.lrs)
    assert values(client, cb.run_id, 'step/train_loss') == pytest.approx([float(o) for o in learn.recorder.losses])
    assert values(client, cb.run_id, 'step/threshold') == pytest.approx([0.2] * 6)
    rows = pd.DataFrame([list(v) for v in learn.recorder.values], columns=learn.recorder.metric_names[1:-1])
    assert values(client, cb.run_id, 'accuracy') == pytest.approx(rows.accuracy.tolist())
    assert steps(client, cb.run_id, 'accuracy') == [3, 6]


def test_parameters_steps_and_epochs(client, tracker, make_learner):
    "By a learner of anyone"
    learn, cb = make_learner(cbs=[ModelEMA(0.5)]), tracker(run_name='first', params={'colour': 'red'})
    quiet_fit(learn, 2, cbs=cb)
    check_everything(client, cb, learn)


def test_an_epoch_is_one_request(tracker, make_learner, make_dls, monkeypatch):
    "The steps of an epoch are sent together, and none while it is trained"
    sent, real = [], mlflow.MlflowClient.log_batch
    learn = make_learner(dls=make_dls(n_batches=20))

    def log_batch(self, *args, **kwargs):
        sent.append(learn.train_iter)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(mlflow.MlflowClient, 'log_batch', log_batch)
    quiet_fit(learn, 2, cbs=tracker())
    assert sent == [0, 20, 40]


def test_thresholds_of_classes(client, tracker, make_learner):
    learn, cb = make_learner(fixmatch=dict(policy=FreeMatch(), threshold=0.95)), tracker(every=2)
    quiet_fit(learn, 2, cbs=cb)
    assert steps(client, cb.run_id) == [2, 4, 6]
    low, mean, high = (values(client, cb.run_id, f'step/threshold_{k}') for k in ('min', 'mean', 'max'))
    assert len(low) == 3 and all(a <= b <= c for a, b, c in zip(low, mean, high))
    assert high[-1] == pytest.approx(learn.fix_match.policy.thresholds().max().item())


def test_losses_that_are_not_finite(client, tracker, make_learner):
    learn, cb = make_learner(), tracker()
    learn.loss_func = lambda pred, y: pred.sum() * float('nan')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet_fit(learn, 1, cbs=cb)
    assert steps(client, cb.run_id, 'step/loss_x') == [1, 2, 3]
    assert all(map(math.isnan, values(client, cb.run_id, 'step/loss_x')))


# --- fits and runs


def test_fits_of_one_callback_are_one_run(client, tracker, make_learner, runs):
    learn = make_learner(cbs=[tracker()])
    quiet_fit(learn, 1)
    quiet_fit(learn, 2)
    (run,) = runs()
    assert steps(client, run.info.run_id) == list(range(1, 10)) and run.info.status == 'FINISHED'


@pytest.mark.parametrize(
    'error, status', [(KeyboardInterrupt, 'KILLED'), (ZeroDivisionError, 'FAILED'), (CancelFitException, 'FINISHED')]
)
@pytest.mark.parametrize('on_learner', [True, False])
def test_how_a_run_ends(client, tracker, make_learner, error, status, on_learner):
    cb = tracker()
    learn = make_learner(cbs=[cb] * on_learner)
    cbs = [cb] * (not on_learner)
    stopped_fit(learn, 2, *cbs, error=error)
    run = client.get_run(cb.run_id)
    assert run.info.status == status and run.info.end_time
    assert steps(client, cb.run_id) == [1, 2, 3, 4, 5]
    quiet_fit(learn, 1, cbs=cbs)
    assert client.get_run(cb.run_id).info.status == 'FINISHED', 'the learner trains on, in the same run'
    assert steps(client, cb.run_id) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_what_is_no_fit_is_no_run(client, tracker, make_learner, runs):
    learn = make_learner(cbs=[tracker()])
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=3, show_plot=False)
        learn.validate()
        learn.get_preds()
    assert runs() == []
    quiet_fit(learn, 1)
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.lr_find(num_it=3, show_plot=False)
    (run,) = runs()
    assert steps(client, run.info.run_id) == [1, 2, 3] and run.info.status == 'FINISHED'


def test_validation_in_the_midst_of_a_fit(client, tracker, make_learner):
    class Validates(Callback):
        order, run_valid = 71, False

        def after_epoch(self):
            if not self.learn.lock.locked():  # `get_preds` has an epoch of its own
                self.learn.get_preds()

    learn, cb = make_learner(), tracker()
    quiet_fit(learn, 2, cbs=[cb, Validates()])
    assert len(values(client, cb.run_id, 'step/threshold')) == 6, 'fastai counts anew, but the run goes on'
    assert client.get_run(cb.run_id).info.status == 'FINISHED'


@pytest.mark.parametrize('on_learner', [True, False])
@pytest.mark.parametrize('every', [1, 2])
def test_a_resumed_fit_goes_on_with_the_run(client, tracker, make_learner, on_learner, every, runs):
    "No step is there twice, whatever of it is trained again"
    learn = make_learner()
    stopped_fit(learn, 3, SaveFixMatch('x', every=every, resume=True), tracker())
    (run,) = runs()
    assert run.info.status == 'KILLED' and steps(client, run.info.run_id) == [1, 2, 3, 4, 5]
    cbs = [SaveFixMatch('x', every=every, resume=True), tracker(**({} if every == 1 else {'run_name': 'anew'}))]
    learn = make_learner(path=learn.path, cbs=cbs if on_learner else ())
    quiet_fit(learn, 3, cbs=None if on_learner else cbs)
    if every == 2:  # nothing was saved yet
        (run,) = (o for o in runs() if o.info.run_name == 'anew')
    else:
        (run,) = runs()
    run = client.get_run(run.info.run_id)
    assert steps(client, run.info.run_id) == list(range(1, 10)) and run.info.status == 'FINISHED'
    assert steps(client, run.info.run_id, 'valid_loss') == [3, 6, 9]


def test_export_and_pickle(client, tracker, make_learner, tmp_path):
    cb = tracker()
    learn = make_learner(cbs=[cb])
    quiet_fit(learn, 1)
    learn.export(tmp_path / 'learner.pkl')
    loaded = load_learner(tmp_path / 'learner.pkl')
    assert next(o for o in loaded.cbs if isinstance(o, MLflowCallback)).run_id == cb.run_id
    cb.log_files(tmp_path / 'learner.pkl')
    assert [o.path for o in client.list_artifacts(cb.run_id)] == ['learner.pkl']
    quiet_fit(learn, 1)
    assert steps(client, cb.run_id) == [1, 2, 3, 4, 5, 6]


def test_other_processes_log_nothing(tracker, make_learner, monkeypatch, runs):
    cb = tracker()
    learn = make_learner(cbs=[cb])
    monkeypatch.setattr('fixmatch_fastai.experiment.tracking.rank_distrib', lambda: 1)
    quiet_fit(learn, 1)
    cb.log_files('nothing')
    assert runs() == [] and cb.run_id is None


# --- where MLflow is, and is not


def test_a_server_that_is_away(make_learner):
    "One warning, and training as ever"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    cb = MLflowCallback(tracking_uri=f'http://127.0.0.1:{port}')
    learn = make_learner(cbs=[cb])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        quiet_fit(learn, 2)
        cb.log_files('nothing')
    (sentence,) = [str(o.message) for o in found if 'MLflow' in str(o.message)]
    assert sentence.startswith('MLflow at http://127.0.0.1:') and 'training goes on' in sentence
    assert len(learn.recorder.values) == 2 and cb.run_id is None
    assert 'MLFLOW_HTTP_REQUEST_MAX_RETRIES' not in os.environ


def test_a_server_that_does_not_answer(tracker, make_learner, monkeypatch):
    "It is asked seldom: at the beginning, and at the end"
    asked = []

    def create_run(self, *args, **kwargs):
        asked.append(os.environ['MLFLOW_HTTP_REQUEST_TIMEOUT'])
        time.sleep(0.3)  # nine times as long it is left alone
        raise TimeoutError

    monkeypatch.setattr(mlflow.MlflowClient, 'create_run', create_run)
    with pytest.warns(UserWarning, match=r"can't be written to \(TimeoutError: TimeoutError\)"):
        quiet_fit(make_learner(), 3, cbs=tracker())
    assert asked == ['20', '20']


@pytest.mark.parametrize('address', ['sqlite:///{0}/file/mlflow.db', 'sqlite:///{0}', 'sqlite:///{0}/no_database'])
def test_a_database_that_cannot_be_opened(make_learner, tmp_path, monkeypatch, address):
    "It does not hold up the epochs, and there is one warning"
    (tmp_path / 'file').touch()
    (tmp_path / 'no_database').write_bytes(b'something else' * 1000)
    waited = []
    monkeypatch.setattr('mlflow.store.db.utils.time.sleep', waited.append)
    learn, cb = make_learner(), MLflowCallback(tracking_uri=address.format(tmp_path))
    with pytest.warns(UserWarning, match="MLflow at sqlite.* can't be written to .*: training goes on") as found:
        quiet_fit(learn, 3, cbs=cb)
    assert len([o for o in found if 'MLflow' in str(o.message)]) == 1
    assert len(learn.recorder.values) == 3 and cb.run_id is None and not waited


def test_a_server_that_comes_back(client, tracker, make_learner, monkeypatch):
    "Nothing is lost, nothing is there twice"
    learn, cb = make_learner(), tracker()
    for name in ('log_batch', 'create_run'):
        real = getattr(mlflow.MlflowClient, name)

        def gone_in_the_middle(self, *args, real=real, **kwargs):
            if learn.epoch == 1:
                raise ConnectionError('gone')
            return real(self, *args, **kwargs)

        monkeypatch.setattr(mlflow.MlflowClient, name, gone_in_the_middle)
    with pytest.warns(UserWarning, match=r"can't be written to \(ConnectionError: gone\)"):
        quiet_fit(learn, 3, cbs=cb)
    assert steps(client, cb.run_id) == list(range(1, 10)) and client.get_run(cb.run_id).info.status == 'FINISHED'
    assert steps(client, cb.run_id, 'valid_loss') == [3, 6, 9]


def test_without_mlflow(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mlflow', None)
    with pytest.raises(ImportError, match=r'MLflowCallback needs MLflow: `pip install mlflow`'):
        MLflowCallback()


def test_every_is_a_number_of_steps():
    with pytest.raises(ValueError, match='1 or more, but got 0'):
        MLflowCallback(every=0)


@pytest.mark.slow
def test_a_database_of_its_own(make_learner, tmp_path, capfd):
    "Without a server: in the learner's folder, and no word of how it is made"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        learn = make_learner()
        cb = MLflowCallback(experiment='x')
        quiet_fit(learn, 1, cbs=cb)
    assert not [o for o in found if 'mlflow' in str(o.filename) or 'MLflow' in str(o.message)]
    assert 'INFO' not in ''.join(capfd.readouterr())
    cb.log_files(learn.path / 'mlflow.db')
    own = mlflow.MlflowClient(f'sqlite:///{learn.path}/mlflow.db')
    assert steps(own, cb.run_id) == [1, 2, 3]
    assert cb.uri == f'sqlite:///{learn.path.resolve()}/mlflow.db', 'also when the fit is over'
    assert (learn.path / 'mlartifacts' / 'x' / cb.run_id / 'artifacts' / 'mlflow.db').exists()
    assert not (tmp_path / 'mlruns').exists()


@pytest.fixture(scope='module')
def server(uri, tmp_path_factory):
    "A real MLflow server on loopback"
    folder = tmp_path_factory.mktemp('mlflow_server')
    shutil.copy(uri.removeprefix('sqlite:///'), folder / 'server.db')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    args = f'server --host 127.0.0.1 --port {port} --workers 1 --backend-store-uri sqlite:///{folder}/server.db'
    command = [sys.executable, '-m', 'mlflow', *args.split(), '--artifacts-destination', f'{folder}/files']
    with (folder / 'log').open('w') as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        for _ in range(2000):
            assert process.poll() is None, (folder / 'log').read_text()
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail(f'the server does not answer: {(folder / "log").read_text()[-2000:]}')
        yield f'http://127.0.0.1:{port}'
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


@pytest.mark.slow
def test_on_a_real_server(server, make_learner, monkeypatch, tmp_path):
    "Which an environment variable names: all that is logged, an interrupt, a resumed fit, files"
    monkeypatch.setenv('MLFLOW_TRACKING_URI', server)
    client = mlflow.MlflowClient(server)
    learn, cb = make_learner(cbs=[ModelEMA(0.5)]), MLflowCallback('birds', 'first', params={'colour': 'red'})
    quiet_fit(learn, 2, cbs=cb)
    check_everything(client, cb, learn)

    cb = MLflowCallback('birds')
    stopped_fit(make_learner(), 3, SaveFixMatch('x', resume=True), cb)
    assert client.get_run(cb.run_id).info.status == 'KILLED' and steps(client, cb.run_id) == [1, 2, 3, 4, 5]
    again = MLflowCallback('birds')
    quiet_fit(make_learner(), 3, cbs=[SaveFixMatch('x', resume=True), again])
    assert again.run_id == cb.run_id and client.get_run(cb.run_id).info.status == 'FINISHED'
    assert steps(client, cb.run_id) == list(range(1, 10)) and steps(client, cb.run_id, 'valid_loss') == [3, 6, 9]

    (tmp_path / 'notes.txt').write_text('seen')
    (tmp_path / 'more').mkdir()
    (tmp_path / 'more/a.txt').write_text('seen too')
    cb.log_files(tmp_path / 'notes.txt', tmp_path / 'more')
    assert {o.path for o in client.list_artifacts(cb.run_id)} == {'notes.txt', 'more'}
    (tmp_path / 'back').mkdir()
    with open(client.download_artifacts(cb.run_id, 'notes.txt', str(tmp_path / 'back'))) as f:
        assert f.read() == 'seen'
