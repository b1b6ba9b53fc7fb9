"""A triton that is missing, broken or another package, or whose import Ctrl-C interrupted."""

import json
import subprocess
import sys

import pytest

from triton_lstm.system.installed import release

LIKE_TRITON = {"language.py": "cdiv = 1", "runtime.py": "class JITFunction: pass"}
BROKEN = {  # the files of a folder named triton, or of a module of that name, and what the reason says
    "none": ({}, "triton is not installed"),
    "stub": ({"triton.py": ""}, "triton.py cannot be used: AttributeError"),
    "stub with a version": ({"triton.py": "__version__ = '3.7.1'"}, "'triton' is not a package"),
    "folder": ({"triton/data.txt": ""}, "/triton cannot be used: AttributeError"),
    "no version": ({"triton/__init__.py": "", **{f"triton/{k}": v for k, v in LIKE_TRITON.items()}}, "'__version__'"),
    "too old": (
        {"triton/__init__.py": "__version__ = '3.2.0'", **{f"triton/{k}": v for k, v in LIKE_TRITON.items()}},
        "triton 3.2.0 is too old: 3.5 or newer is needed",
    ),
    "no kernel can be made of it": (
        {"triton/__init__.py": "__version__ = '3.7.1'", **{f"triton/{k}": v for k, v in LIKE_TRITON.items()}},
        "the kernels with triton",
    ),
    "syntax": ({"triton/__init__.py": "def ("}, "SyntaxError: invalid syntax"),
    "RuntimeError": ({"triton/__init__.py": "raise RuntimeError('no driver\\nat all')"}, "RuntimeError: no driver."),
    "a version of numbers": (
        {"triton/__init__.py": "__version__ = [3, 2]", **{f"triton/{k}": v for k, v in LIKE_TRITON.items()}},
        "triton [3, 2] is too old: 3.5 or newer is needed",
    ),
    "no message": ({"triton.py": "class E(Exception):\n def __str__(self): 1 / 0\nraise E"}, "E: its message cannot"),
    "an enum": ({"triton.py": "import signal\nsignal.Handlers(5)"}, "ValueError: 5 is not a valid Handlers"),
    "BaseException": ({"triton.py": "raise GeneratorExit('odd')"}, "GeneratorExit: odd"),
    "exit": ({"triton.py": "raise SystemExit('needs a GPU')"}, "SystemExit: needs a GPU"),
    "ImportError": ({"triton/__init__.py": "raise ImportError('libfoo.so.1')"}, "ImportError: libfoo.so.1"),
    "what it needs": ({"triton/__init__.py": "import nowhere_at_all"}, "No module named 'nowhere_at_all'"),
}

# A process that has torch and no triton, and one child for each folder of broken ones
IN_A_CHILD = """
import contextlib, io, json, os, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch, triton_lstm
from triton_lstm.cli import doctor
torch.set_num_threads(1)

def reported(folder):
    sys.path[:] = [folder, *(place for place in sys.path if "site-packages" not in place)]
    x, plain, ours = torch.randn(3, 2, 4), torch.nn.LSTM(4, 5), triton_lstm.LSTM(4, 5)
    ours.load_state_dict(plain.state_dict())
    for module in (plain, ours):
        module(x)[0].square().sum().backward()
    same = all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), ours.parameters()))
    try:
        triton_lstm.LSTM(4, 5, backend="triton")(x)
        error = "none"
    except RuntimeError as e:
        error = str(e)
    with contextlib.redirect_stdout(io.StringIO()) as explained:
        triton_lstm.explain(ours, x)
    finding = doctor._triton()
    answers = doctor._results(torch.device("cpu"))
    return dict(same=same, error=error, explained=explained.getvalue(), doctor=[finding.state, finding.text],
                answers=[answers.state, answers.text])

for folder in sys.argv[1:]:
    sys.stdout.flush()
    if os.fork() == 0:
        print(json.dumps(reported(folder)), flush=True)
        os._exit(0)
    os.wait()
"""


def lines_of(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The report of a process for each of BROKEN."""
    top = tmp_path_factory.mktemp("broken")
    for k, (files, _) in enumerate(BROKEN.values()):
        for name, text in files.items():
            (top / str(k) / name).parent.mkdir(parents=True, exist_ok=True)
            (top / str(k) / name).write_text(text)
    lines = lines_of(IN_A_CHILD, *(top / str(k) for k in range(len(BROKEN))))
    return dict(zip(BROKEN, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("name", BROKEN)
def test_every_call_goes_to_pytorch_and_the_reason_is_named(name, reported):
    found, reason = reported[name], BROKEN[name][1]
    assert found["same"]
    assert found["error"].startswith('backend="triton" cannot run this call: ') and reason in found["error"]
    assert "PyTorch's own LSTM: " in found["explained"] and reason.rstrip(".") in found["explained"]
    state, text = found["answers"]
    assert state == "BAD" and reason.rstrip(".") in text
    if name != "no kernel can be made of it":  # only the results show it
        state, text = found["doctor"]
        assert state == "BAD" and reason.removeprefix("triton ").rstrip(".") in text


# Ctrl-C, or what a program's own handler of a signal raises, where the import of a module begins, in the first call
INTERRUPTED = """
import functools, os, signal, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch, triton_lstm
torch.set_num_threads(1)

class Raises:
    def __init__(self, kind):
        self.kind = kind
    def __call__(self, number, frame):
        raise self.kind("of the program's own")

raises = Raises(TimeoutError)
HANDLERS = {
    "KeyboardInterrupt": signal.default_int_handler,
    "TimeoutError": raises,
    "ImportError": functools.partial(Raises.__call__, Raises(ImportError)),
    "SystemExit": lambda number, frame: sys.exit(7),
}

class Signal:
    def __init__(self, name, handler):
        self.name = name
        signal.signal(signal.SIGUSR1, handler)
    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            self.name = None
            signal.raise_signal(signal.SIGUSR1)

x, module = torch.randn(2, 1, 3), triton_lstm.LSTM(3, 2)
expected = torch.nn.LSTM(3, 2)
expected.load_state_dict(module.state_dict())
for name in sys.argv[2:]:
    sys.stdout.flush()
    if os.fork() == 0:
        sys.meta_path.insert(0, Signal(name, HANDLERS[sys.argv[1]]))
        try:
            module(x)
            print("nothing", end=" ")
        except BaseException as error:
            print(type(error).__name__, end=" ")
        y = triton_lstm.LSTM.forward(module, x)[0]
        y.sum().backward()
        close = torch.allclose(y, expected(x)[0], atol=1e-5)
        print("right" if close else "wrong", "kernels" if "triton_lstm.kernels" in sys.modules else "PyTorch",
              module._route(x, list(module.parameters()), None, 1, False).why_torch, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "TimeoutError", "ImportError", "SystemExit"])
def test_a_signal_in_the_first_call_is_raised_once(kind, interpreter):
    """A partial triton is left in sys.modules; the next call starts from scratch, and uses the kernels."""
    ours = ("operator.autograd", "kernels.launch", "kernels.forward", "operator.layer")
    names = [f"triton.{name}" for name in ("knobs", "compiler", "language.standard")]
    names += [f"triton_lstm.{name}" for name in ours] if kind == "KeyboardInterrupt" else []
    assert lines_of(INTERRUPTED, kind, *names) == [f"{kind} right kernels None"] * len(names)


def test_ctrl_c_wrapped_in_another_error_is_still_ctrl_c(tmp_path):
    """Python before 3.12 wraps exceptions from __set_name__ in RuntimeError, and triton has many such descriptors."""
    (tmp_path / "triton.py").write_text("raise RuntimeError('in a descriptor') from KeyboardInterrupt()")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch, triton_lstm
for _ in range(2):
    try:
        triton_lstm.LSTM(3, 2)(torch.zeros(2, 1, 3))
    except KeyboardInterrupt:
        print("Ctrl-C")
"""
    assert lines_of(code) == ["Ctrl-C"] * 2


@pytest.mark.parametrize(
    "version, numbers", [("3.7.1", (3, 7)), ("2.13.0+cpu", (2, 13)), ("2.5rc1", (2, 5)), ("main", (0,)), (None, (0,))]
)
def test_any_version_can_be_compared(version, numbers):
    assert release(version) == numbers
