"""Every format of a log is read back as it was written, and what is malformed is named with its place."""

import builtins
import json
import struct

import numpy as np
import pytest
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
from tensorboardX.record_writer import RecordWriter

from policy_split_jax.errors import UserError
from policy_split_jax.parity.logs import Curves, read_curves

CONSOLE = """\
ray init kwargs: {'num_cpus': None}
step: 7 is mentioned, and so is step:8 - the next one
(TaskRunner pid=123) step:0 - val-core/openai/gsm8k/acc/mean@1:0.508
\x1b[36m(TaskRunner pid=123, ip=10.0.0.1)\x1b[0m step:1 - actor/pg_loss:0.012 - critic/score/mean:np.float64(0.5) - n:3
Training Progress:  50%|#####     | 1/2 [00:10<00:10]step:2 - actor/pg_loss:-1.5e-05 - actor/lr:1e-06 - skipped:nan
(WorkerDict pid=9) substep:3 - actor/pg_loss:9.0
"""


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text.encode())
    return path


def json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        read_curves(path)
    return str(error.value)


def test_a_run_folder_of_ours(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    train = {"kind": "train", "step": 1, "reward/normal": 0.25, "loss": None}
    rows = [{"kind": "eval", "step": 0, "accuracy/normal": 0.5, "k": 8}, train, train | {"step": 2, "loss": -0.125}]
    write(folder, "metrics.jsonl", json_lines(*rows))
    assert read_curves(folder) == Curves(
        "tiny",
        {
            "eval/accuracy/normal": [(0, 0.5)],
            "eval/k": [(0, 8.0)],
            "reward/normal": [(1, 0.25), (2, 0.25)],
            "loss": [(2, -0.125)],
        },
    )


def test_the_file_logger_of_verl(tmp_path):
    rows = [{"step": 2, "data": {"actor/pg_loss": 0.1, "note": "text"}}, {"step": 1, "data": {"actor/pg_loss": 3}}]
    curves = read_curves(write(tmp_path, "golden.jsonl", json_lines(*rows)))
    assert curves == Curves("golden", {"actor/pg_loss": [(1, 3.0), (2, 0.1)]})


def test_plain_objects_with_a_step(tmp_path):
    path = write(tmp_path, "plain.jsonl", json_lines({"step": 1.0, "loss": 0.5}, {"step": 2, "loss": 0.75, "data": 4}))
    assert read_curves(path).metrics == {"loss": [(1, 0.5), (2, 0.75)], "data": [(2, 4.0)]}


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = write(tmp_path, "a.jsonl", '\ufeff{"step": 1, "loss": 0.5}\n')
    assert read_curves(path).metrics == {"loss": [(1, 0.5)]}


def test_the_later_of_two_values_counts_and_what_is_not_finite_is_left_out(tmp_path):
    text = '{"step": 1, "a": 1.0}\n{"step": 2, "a": NaN}\n{"step": 3, "a": Infinity}\n{"step": 1, "a": 2.0}\n'
    assert read_curves(write(tmp_path, "a.jsonl", text)).metrics == {"a": [(1, 2.0)]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"step": 2, "loss"', "a.jsonl, line 2 is not JSON"),
        ('{"loss": 1.0}', 'a.jsonl, line 2 is no JSON object with a whole "step"'),
        ('{"step": 1.5, "loss": 1.0}', 'line 2 is no JSON object with a whole "step"'),
        ('{"step": "2", "loss": 1.0}', 'line 2 is no JSON object with a whole "step"'),
        ("[1, 2]", "line 2 is no JSON object"),
    ],
)
def test_malformed_json_lines(tmp_path, line, words):
    assert words in refused(write(tmp_path, "a.jsonl", f'{{"step": 1, "loss": 0.5}}\n{line}\n'))


def test_a_last_line_of_json_that_is_being_written_is_passed_over(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert read_curves(path).metrics == {"loss": [(1, 0.5)]}
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}')
    assert read_curves(path).metrics == {"loss": [(1, 0.5), (2, 0.25)]}


@pytest.mark.parametrize("name", ["verl.log", "verl.txt"])
def test_the_console_logger_of_verl(tmp_path, name):
    assert read_curves(write(tmp_path, name, CONSOLE)) == Curves(
        "verl",
        {
            "val-core/openai/gsm8k/acc/mean@1": [(0, 0.508)],
            "actor/pg_loss": [(1, 0.012), (2, -1.5e-05)],
            "critic/score/mean": [(1, 0.5)],
            "n": [(1, 3.0)],
            "actor/lr": [(2, 1e-06)],
        },
    )


def test_colours_of_a_console(tmp_path):
    text = "\x1b[1mstep:1 - a:\x1b[32m0.5\x1b[0m - b:2.0\x1b[0m\n"
    assert read_curves(write(tmp_path, "verl.log", text)).metrics == {"a": [(1, 0.5)], "b": [(1, 2.0)]}


def test_a_console_line_that_breaks_off_is_named(tmp_path):
    text = "step:1 - a:1.0 - b:2.0\r\nstep:2 - a:1.0 - b:2.0(WorkerDict pid=9) oops\n"
    assert "verl.log, line 2: 'b:2.0(WorkerDict pid=9) oops' is not NAME:NUMBER" in refused(
        write(tmp_path, "verl.log", text)
    )


def test_a_last_console_line_without_an_end_may_be_cut_inside_a_number(tmp_path):
    path = write(tmp_path, "verl.log", "step:1 - a:1.25\nstep:2 - a:0.0")
    assert read_curves(path).metrics == {"a": [(1, 1.25)]}


def test_a_log_without_metrics(tmp_path):
    assert "verl.log: holds no metrics" in refused(write(tmp_path, "verl.log", "nothing here\n"))


def test_the_export_of_a_chart_by_wandb(tmp_path):
    text = (
        '\ufeff"Step","run - a - actor/pg_loss","run - a - actor/pg_loss__MIN","run - a - actor/pg_loss__MAX",'
        '"run - a - _step"\r\n"1","0.5","0.25","0.75","1"\r\n"2","","","","2"\r\n"3","NaN","","","3"\r\n'
        '"4","-1e-3","","","4"\r\n'
    )
    assert read_curves(write(tmp_path, "wandb.csv", text)) == Curves("wandb", {"actor/pg_loss": [(1, 0.5), (4, -1e-3)]})


@pytest.mark.parametrize("step", ["_step", "trainer/global_step"])
def test_plain_columns_by_wandb(tmp_path, step):
    text = f",_runtime,loss,{step},critic/score/mean\n0,9.5,0.5,1,0.25\n1,19.5,0.125,2,\n"
    curves = read_curves(write(tmp_path, "history.csv", text))
    assert curves.metrics == {"loss": [(1, 0.5), (2, 0.125)], "critic/score/mean": [(1, 0.25)]}


def test_the_export_of_a_scalar_by_tensorboard(tmp_path):
    path = write(tmp_path, "grad_norm.csv", "Wall time,Step,Value\n1700000000.5,1,0.5\n1700000001.5,2,0.0625\n")
    assert read_curves(path) == Curves("grad_norm", {"grad_norm": [(1, 0.5), (2, 0.0625)]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a.csv, line 1: no column Step, trainer/global_step, _step"),
        ("a,b\n1,2\n", "a.csv, line 1: no column Step"),
        ("Step,loss\n1,0.5\n2\n", "a.csv, line 3: 1 cells under 2 columns"),
        ("Step,loss\n1,0.5\n1.5,0.5\n", "a.csv, line 3: Step holds '1.5', no whole number"),
        ("Step,loss\n1,much\n", "a.csv, line 2: loss holds no number"),
        ("Step,a - loss,b - loss\n1,0.5,0.5\n", "holds several runs (a, b); export each to a file of its own"),
        ("Step,a - loss,a - loss\n1,0.5,0.5\n", "line 1: loss is there twice"),
        ("Step,loss\n1,\n", "a.csv: holds no metrics"),
        ('Step,loss\n1,"' + "9" * 200_000 + '"\n', "line 2: field larger than field limit"),
    ],
)
def test_malformed_tables(tmp_path, text, words):
    assert words in refused(write(tmp_path, "a.csv", text))


def test_a_last_row_that_is_being_written_is_passed_over(tmp_path):
    assert read_curves(write(tmp_path, "a.csv", "Step,loss\n1,0.5\n2")).metrics == {"loss": [(1, 0.5)]}
    assert read_curves(write(tmp_path, "a.csv", "Step,loss\n1,0.5\n2,0.25")).metrics == {"loss": [(1, 0.5), (2, 0.25)]}


def test_event_files_of_tensorboard(tmp_path):
    folder = tmp_path / "events"
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar("actor/pg_loss", 0.1, 1)
        writer.add_scalar("actor/pg_loss", -0.25, 2)
        writer.add_scalar("actor/lr", 3e-6, 2)
        writer.add_text("val/generations", "no number", 2)
        writer.add_histogram("weights", np.arange(9.0), 2)
    # A scalar of an event file is a float32.
    expected = {"actor/pg_loss": [(1, float(np.float32(0.1))), (2, -0.25)], "actor/lr": [(2, float(np.float32(3e-6)))]}
    assert read_curves(folder) == Curves("events", expected)


def tensor_event(step, tag, **tensor):
    event = Event(step=step)
    value = event.summary.value.add(tag=tag)
    for field, content in tensor.items():
        target = getattr(value.tensor, field)
        if isinstance(content, list):
            target.extend(content)
        else:
            setattr(value.tensor, field, content)
    return event


def write_events(path, *events):
    writer = RecordWriter(str(path))
    for event in events:
        writer.write(event.SerializeToString())
    writer.close()


def test_scalars_that_are_tensors(tmp_path):
    write_events(
        tmp_path / "events.out.tfevents.1.host",
        tensor_event(1, "listed", dtype=1, float_val=[0.5]),
        tensor_event(2, "packed", dtype=1, tensor_content=struct.pack("<f", 0.75)),
        tensor_event(3, "double", dtype=2, double_val=[0.1]),
        tensor_event(4, "packed double", dtype=2, tensor_content=struct.pack("<d", 0.2)),
        tensor_event(5, "vector", dtype=1, float_val=[0.5, 0.25]),
        tensor_event(6, "text", dtype=7, string_val=[b"0.5"]),
    )
    assert read_curves(tmp_path).metrics == {
        "listed": [(1, 0.5)],
        "packed": [(2, 0.75)],
        "double": [(3, 0.1)],
        "packed double": [(4, 0.2)],
    }


def scalar_event(step, value):
    event = Event(step=step)
    event.summary.value.add(tag="a", simple_value=value)
    return event


def test_the_later_event_file_counts(tmp_path):
    write_events(tmp_path / "events.out.tfevents.2.host", scalar_event(2, 0.75))
    write_events(tmp_path / "events.out.tfevents.1.host", scalar_event(1, 0.5), scalar_event(2, 0.25))
    assert read_curves(tmp_path).metrics == {"a": [(1, 0.5), (2, 0.75)]}


@pytest.mark.parametrize("kept", [3, 14, -1])
def test_a_last_event_that_is_being_written_is_passed_over(tmp_path, kept):
    path = tmp_path / "events.out.tfevents.1.host"
    write_events(path, scalar_event(1, 0.5))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + path.read_bytes()[:kept])
    assert path.stat().st_size > size
    assert read_curves(tmp_path).metrics == {"a": [(1, 0.5)]}


@pytest.mark.parametrize(("byte", "tells"), [(0, 12), (20, 12)])
def test_a_damaged_event_file_is_named(tmp_path, byte, tells):
    path = tmp_path / "events.out.tfevents.1.host"
    write_events(path, scalar_event(1, 0.5))
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)
    assert f"events.out.tfevents.1.host: the record before byte {tells} is damaged" in refused(tmp_path)


def test_a_record_that_is_no_event_is_named(tmp_path):
    writer = RecordWriter(str(tmp_path / "events.out.tfevents.1.host"))
    writer.write(b"\xff\xff\xff")
    writer.close()
    assert "is no event of TensorBoard" in refused(tmp_path)


def test_without_tensorboardx_the_user_is_told_what_to_install(tmp_path, monkeypatch):
    write_events(tmp_path / "events.out.tfevents.1.host", scalar_event(1, 0.5))
    known = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("tensorboardX"):
            raise ImportError(name)
        return known(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'policy-split-jax[tensorboard]'" in refused(tmp_path)


def test_what_is_not_there_or_no_log(tmp_path):
    assert "nothing.log: no such file or folder" in refused(tmp_path / "nothing.log")
    assert "holds neither metrics.jsonl nor events.out.tfevents.*" in refused(tmp_path)
    assert "unknown format '.pdf'; logs end in .jsonl, .log, .txt, .csv" in refused(write(tmp_path, "a.pdf", "x"))
    (tmp_path / "bad.csv").write_bytes(b"Step,loss\n1,\xff\n")
    assert "bad.csv: not UTF-8 at byte 12" in refused(tmp_path / "bad.csv")
    assert "cannot be read" in refused(f"{tmp_path}/{'x' * 300}.log")
