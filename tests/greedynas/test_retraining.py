import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import SPACE, contents, retrain_config

import greedynas.retraining
from greedynas.data import BatchStream, load_data
from greedynas.metrics_log import MetricsLog
from greedynas.network import Network
from greedynas.retraining import NetworkTrainer, accuracy, retrain, update_average
from greedynas.rmsprop import TensorFlowRMSprop
from greedynas.runs import RunFolder, load_run
from greedynas.storage import load_tensors
from greedynas_ext.strict_json import read_json

pytestmark = pytest.mark.usefixtures("tiny_space")
PATH = torch.tensor([0, 1, 1, 0])


@pytest.fixture
def make(tiny_task):
    torch.set_num_threads(1)
    return lambda **options: NetworkTrainer(retrain_config(Path("run"), **options), tiny_task, PATH)


@pytest.fixture
def run_dir(run_copy):
    """A finished training and search."""
    shutil.rmtree(run_copy / "retrain")
    return run_copy


def config_of(run, **options):
    """A retraining of four steps an epoch."""
    return retrain_config(run, **({"batch_size": 360} | options))


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def outcome(folder):
    """What a retraining ends with, but for measured times."""
    summary = read_json(folder.summary)
    records = MetricsLog(folder.metrics).read()
    for values in (summary, *records):
        del values["seconds"]
    return folder.network.read_bytes(), summary, records


# Training


def test_an_epoch_equals_a_plain_loop(make, tiny_task):
    trainer = make(dropout=0.0, epochs=4, warmup_epochs=1.0, weight_decay=0.01, learning_rate=0.1)
    plain = Network(SPACE, PATH, seed=0).train()
    momenta = {}
    stream = BatchStream(tiny_task.data.train_and_validation, 128, seed=0, augment=True)
    assert trainer.batches.batches_per_epoch == 11
    losses = []
    for step in range(22):
        images, targets = stream.batch(step)
        loss = F.cross_entropy(plain(images), targets, label_smoothing=0.1)
        losses.append(loss.item())
        rate = 0.1 * (step + 1) / 11 if step < 11 else 0.1 * 0.5 * (1 + math.cos(math.pi * (step - 11) / 32))
        names = [name for name, _ in plain.named_parameters()]
        for name, gradient in zip(names, torch.autograd.grad(loss, list(plain.parameters())), strict=True):
            p = plain.get_parameter(name)
            if p.dim() > 1:  # biases and batch normalisations have no weight decay
                gradient = gradient + 0.01 * p.detach()
            momenta[name] = 0.9 * momenta[name] + gradient if name in momenta else gradient
            with torch.no_grad():
                p -= rate * (gradient + 0.9 * momenta[name])
    records = [trainer.run_epoch(), trainer.run_epoch()]
    assert records[0]["training_loss"] == pytest.approx(np.mean(losses[:11]), rel=1e-4)
    assert records[1]["training_loss"] == pytest.approx(np.mean(losses[11:]), rel=1e-3)
    assert [record["epoch"] for record in records] == [0, 1]
    assert [record["images_trained"] for record in records] == [11 * 128, 22 * 128]
    got = trainer.network.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(got[name], tensor, rtol=1e-2, atol=1e-4), name


def test_learning_rate_of_sgd(make):
    trainer = make(epochs=5, warmup_epochs=2.0, learning_rate=0.4)
    rates = [trainer.learning_rate(step) for step in range(55)]
    assert rates[:22] == pytest.approx([0.4 * (step + 1) / 22 for step in range(22)])
    assert rates[22:] == pytest.approx([0.2 * (1 + math.cos(math.pi * i / 32)) for i in range(33)], abs=1e-12)


def test_learning_rate_of_rmsprop(make):
    trainer = make(epochs=20, optimizer="rmsprop", warmup_epochs=3.0, learning_rate=0.064)
    assert trainer.learning_rate(0) == pytest.approx(0.064 / 33)
    assert trainer.learning_rate(32) == pytest.approx(0.064)
    for epoch, decays in ((3.0, 1), (4.7, 1), (5.0, 2), (9.0, 3), (19.9, 8)):  # every 2.4 epochs, from the first on
        assert trainer.learning_rate(int(epoch * 11)) == pytest.approx(0.064 * 0.97**decays)


@pytest.mark.parametrize("warmup", [0.0, 2.0, 9.0])
def test_the_warm_up_may_be_nothing_or_everything(warmup, make):
    trainer = make(epochs=2, warmup_epochs=warmup, learning_rate=0.1)
    rates = [trainer.learning_rate(step) for step in range(22)]
    assert all(0.0 <= rate <= 0.1 for rate in rates)
    if warmup:
        assert rates == sorted(rates)
    else:
        assert rates[0] == 0.1
        assert rates == sorted(rates, reverse=True)


def test_the_rate_in_the_optimizer_is_that_of_the_schedule(make):
    trainer = make()
    rates = []
    trainer.optimizer.register_step_pre_hook(lambda o, *_: rates.append({g["lr"] for g in o.param_groups}))
    records = [trainer.run_epoch() for _ in range(3)]
    assert rates == [{trainer.learning_rate(step)} for step in range(33)]
    assert [record["learning_rate"] for record in records] == [trainer.learning_rate(step) for step in (10, 21, 32)]


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("rmsprop", TensorFlowRMSprop)])
def test_optimizers_and_what_they_decay(name, kind, make):
    trainer = make(optimizer=name, weight_decay=0.5, learning_rate=0.01)
    assert type(trainer.optimizer) is kind
    decays = {p: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert decays.keys() == set(trainer.network.parameters())
    for p in trainer.network.parameters():
        assert decays[p] == (0.5 if p.dim() > 1 else 0.0)
    before = state(trainer.network)
    assert math.isfinite(trainer.run_epoch()["training_loss"])
    assert not same(before, trainer.network.state_dict())


def test_training_learns(make):
    trainer = make(epochs=4, batch_size=48, learning_rate=0.1, dropout=0.0)
    losses = [trainer.run_epoch()["training_loss"] for _ in range(4)]
    assert losses[-1] < losses[0] - 0.2


def test_divergence(make):
    trainer = make(learning_rate=1e30, warmup_epochs=0.0)
    with pytest.raises(FloatingPointError, match=r"^retraining: the loss became nan in epoch 0; a lower learning_rate"):
        trainer.run_epoch()


# Dropout


def test_dropout_repeats_for_an_epoch_and_differs_between_epochs_and_seeds(make, monkeypatch):
    masks = []

    def run(seed, epoch):
        trainer = make(seed=seed, dropout=0.5)
        trainer.epoch = epoch
        seen = []
        # Of ones, so that what is seen is the mask and nothing of weights and images.
        dropout = trainer.network.head.dropout
        dropout.register_forward_hook(
            lambda m, i, o: seen.append(F.dropout(torch.ones_like(o), 0.5)) or seen[-1] * i[0]
        )
        torch.manual_seed(len(masks))  # the global generator has no say
        trainer.run_epoch()
        masks.append(seen)
        return seen

    first, again, other_epoch, other_seed = run(0, 0), run(0, 0), run(0, 1), run(1, 0)
    assert all(map(torch.equal, first, again))
    assert 0.3 < (first[0] == 0).float().mean() < 0.7
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other_epoch[0])
    assert not torch.equal(first[0], other_seed[0])


def test_global_generators_are_left_alone(make):
    trainer = make(dropout=0.5)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    trainer.run_epoch()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert random.getstate() == before[2]


# Moving average


def test_moving_average_is_the_recurrence(make):
    trainer = make(ema_decay=0.6, dropout=0.0)
    expected = {name: tensor.double().clone() for name, tensor in trainer.network.state_dict().items()}
    original, step = trainer.optimizer.step, [0]

    def stepped():
        original()
        decay = min(0.6, (1 + step[0]) / (10 + step[0]))
        for name, tensor in trainer.network.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
            else:
                expected[name] = tensor.double()
        step[0] += 1

    trainer.optimizer.step = stepped
    for _ in range(2):
        trainer.run_epoch()
    assert step[0] == 22
    for name, tensor in trainer.average.state_dict().items():
        assert torch.allclose(tensor.double(), expected[name], rtol=1e-4, atol=1e-6), name
    assert trainer.tested is trainer.average
    assert not same(trainer.average.state_dict(), trainer.network.state_dict())


def test_without_a_moving_average_the_network_is_tested(make):
    trainer = make(ema_decay=0.0)
    assert trainer.average is None
    assert trainer.tested is trainer.network


def test_update_average_copies_counters_and_keeps_no_graph():
    mean, network = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    network(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)))
    update_average(mean, network, 0.999, 0)  # the first step: decay 1/10
    assert mean.num_batches_tracked == 1
    assert torch.allclose(mean.running_mean, 0.9 * network.running_mean)
    assert mean.weight.grad_fn is None
    update_average(mean, network, 0.0, 100)
    assert torch.equal(mean.running_var, network.running_var)


# Accuracy


def test_accuracy_is_in_evaluation_mode_and_puts_the_mode_back():
    class Counting(torch.nn.Module):
        def forward(self, x):
            assert not self.training
            return x

    module = Counting().train()
    logits = torch.eye(4)
    batches = [(logits[:3], torch.tensor([0, 1, 0])), (logits[3:], torch.tensor([3]))]
    assert accuracy(module, batches) == (0.75, 4)
    assert module.training
    with pytest.raises(ZeroDivisionError):
        accuracy(module, [(1 / 0, None) for _ in range(1)])
    assert accuracy(module.eval(), batches) == (0.75, 4)
    assert not module.training


# Whole retrainings


@pytest.fixture
def opened(monkeypatch):
    """The runs that `retrain` opens."""
    runs = []
    monkeypatch.setattr(greedynas.retraining, "load_run", lambda root: runs.append(load_run(root)) or runs[-1])
    return runs


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "optimizer": "rmsprop", "learning_rate": 0.005}])
def test_what_a_retraining_leaves(options, run_dir, opened):
    folder = retrain(config_of(run_dir, **options))
    chosen = read_json(run_dir / "search" / "nsga2" / "summary.json")["chosen"]
    summary = read_json(folder.summary)
    assert folder == RunFolder(run_dir).retraining("nsga2")
    assert summary["path"] == chosen["path"]
    assert summary["names"] == chosen["names"]
    assert summary["epochs"] == 3
    assert summary["images_trained"] == 3 * 4 * 360
    assert summary["params"] == SPACE.params(chosen["path"])
    assert summary["macs"] == SPACE.macs(chosen["path"]) / 1e6
    test = opened[0].task.data.test
    assert test.reads == 1  # every image once, at the end
    assert test.images_read == summary["test_images"] == 355
    tensors, metadata = load_tensors(folder.network)
    assert metadata == {"path": chosen["path"]}
    network = Network(SPACE, chosen["path"], dropout=0.2).eval()
    network.load_state_dict(tensors)
    data = load_data("digits", seed=0)
    images, targets = data.test.batch(torch.arange(355))
    with torch.no_grad():
        right = (network(images).argmax(1) == targets).sum().item()
    assert summary["test_accuracy"] == pytest.approx(right / 355, abs=1.5 / 355)
    assert [record["epoch"] for record in MetricsLog(folder.metrics).read()] == [0, 1, 2]


def test_the_test_set_is_closed_while_it_trains(run_dir, opened, monkeypatch):
    original = NetworkTrainer.run_epoch

    def run_epoch(self):
        assert not self.task.data.test.opened
        return original(self)

    monkeypatch.setattr(NetworkTrainer, "run_epoch", run_epoch)
    retrain(config_of(run_dir))
    assert opened[0].task.data.test.opened


def test_training_begins_afresh_and_on_all_images_but_the_test_set(run_dir, opened, monkeypatch):
    first = []
    original = NetworkTrainer.run_epoch

    def run_epoch(self):
        if not first:
            first.append(state(self.network))
        return original(self)

    monkeypatch.setattr(NetworkTrainer, "run_epoch", run_epoch)
    folder = retrain(config_of(run_dir, seed=5))
    fresh = Network(SPACE, read_json(folder.summary)["path"], seed=5, dropout=0.2)
    assert same(first[0], fresh.state_dict())  # not the supernet's weights
    assert len(opened[0].task.data.train_and_validation) == 1154 + 288


def test_a_seed_repeats_and_another_does_not(run_dir):
    options = {"ema_decay": 0.5, "dropout": 0.3}
    first = outcome(retrain(config_of(run_dir, name="a", seed=2, **options)))
    torch.manual_seed(77)
    assert outcome(retrain(config_of(run_dir, name="b", seed=2, **options))) == first
    assert outcome(retrain(config_of(run_dir, name="c", seed=3, **options)))[0] != first[0]


def test_another_path_instead(run_dir):
    shutil.rmtree(run_dir / "search")  # no search is needed
    folder = retrain(config_of(run_dir, path="e3k3  id e3k5 id", name="mine", epochs=1))
    assert read_json(folder.summary)["path"] == [0, 2, 1, 2]


def test_the_checkpoints_interval_does_not_matter(run_dir):
    results = [outcome(retrain(config_of(run_dir, name=f"i{i}", checkpoint_interval=i))) for i in (1, 50)]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("epoch", "options"),
    [(0, {}), (1, {}), (1, {"ema_decay": 0.9}), (2, {"optimizer": "rmsprop", "learning_rate": 0.005})],
)
def test_interrupted_and_resumed(options, epoch, run_dir, monkeypatch):
    options = options | {"checkpoint_interval": 1, "dropout": 0.3}
    expected = outcome(retrain(config_of(run_dir, name="whole", **options)))
    original = NetworkTrainer._step

    def step(self, number, images, targets):
        if number == epoch * 4 + 2:
            raise KeyboardInterrupt
        return original(self, number, images, targets)

    config = config_of(run_dir, name="cut", **options)
    with monkeypatch.context() as patch:
        patch.setattr(NetworkTrainer, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            retrain(config)
    assert not RunFolder(run_dir).retraining("cut").finished
    assert outcome(retrain(config, resume=True)) == expected


def test_a_finished_retraining_is_left_alone(run_dir, opened):
    folder = retrain(config_of(run_dir))
    before = contents(run_dir)
    opened.clear()
    assert retrain(config_of(run_dir), resume=True) == folder
    assert not opened[0].task.data.test.opened
    with pytest.raises(FileExistsError, match="holds a run already"):
        retrain(config_of(run_dir))
    with pytest.raises(ValueError, match=r"^epochs: expected 3, with which .* was started, got 4"):
        retrain(config_of(run_dir, epochs=4), resume=True)
    assert contents(run_dir) == before


# Errors


def test_no_search(run_dir):
    with pytest.raises(FileNotFoundError, match=r"^search: no finished search 'best' in .*; there are: nsga2$"):
        retrain(config_of(run_dir, search="best"))
    shutil.rmtree(run_dir / "search")
    with pytest.raises(FileNotFoundError, match=r"there are: none$"):
        retrain(config_of(run_dir))
    assert not (run_dir / "retrain").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "e3k3 id"}, r"^path: expected 4 \(one operation per layer\), got 2"),
        ({"path": "e3k3 id e9k9 id"}, r"^path: layer 2: expected one of e3k3, e3k5, id .*got 'e9k9'"),
        ({"batch_size": 5000}, r"^batch_size: 5000 exceeds the 1442 images"),
        ({"epochs": 0}, r"^epochs: expected at least 1"),
        ({"checkpoint_interval": 0}, r"^checkpoint_interval: expected at least 1"),
    ],
)
def test_bad_options_leave_no_folder(options, message, run_dir):
    with pytest.raises(ValueError, match=message):
        retrain(config_of(run_dir, **options))
    assert not (run_dir / "retrain").exists()


def test_damaged_checkpoints_are_named(run_dir):
    folder = retrain(config_of(run_dir))
    folder.summary.unlink()
    data = folder.checkpoint.read_bytes()
    folder.checkpoint.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=re.escape(str(folder.checkpoint))):
        retrain(config_of(run_dir), resume=True)
    shutil.copy(run_dir / "checkpoint.safetensors", folder.checkpoint)  # of a training
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: unexpected tensor 'supernet"):
        retrain(config_of(run_dir), resume=True)


def test_a_checkpoint_without_its_state_is_named(run_dir, make, tmp_path):
    trainer = make()
    folder = RunFolder(tmp_path)
    greedynas.retraining.save_checkpoint(
        folder.checkpoint, trainer._modules(), trainer.optimizer, trainer.generator, {"epoch": 1}
    )
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: expected the state of a retraining, got KeyError"):
        trainer.restore(folder)


def test_a_trainer_checks_its_options(tiny_task):
    with pytest.raises(ValueError, match="dropout: expected a value in"):
        NetworkTrainer(retrain_config(Path("run"), dropout=1.5), tiny_task, PATH)
