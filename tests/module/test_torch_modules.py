"""PyTorch's own generic module tests, on its samples for nn.LSTM."""

import copy
import functools
import importlib.util
import io
import pickle
import sys
import types
import unittest

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils._pytree import tree_leaves, tree_map

import triton_lstm
from triton_lstm.dispatch import no_kernel_for

# Not on every machine with a GPU; PyTorch's TestCase needs no more of it than this
if importlib.util.find_spec("expecttest") is None:
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase, ACCEPT=False)
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)  # or no test of ours could set one of cuDNN's
    from torch.testing._internal.common_device_type import instantiate_device_type_tests, onlyCPU, onlyCUDA
    from torch.testing._internal.common_methods_invocations import DecorateInfo
    from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, TrainEvalMode, module_db, modules
    from torch.testing._internal.common_utils import TestCase, gradcheck, gradgradcheck, noncontiguous_like

# What nn.LSTM can do and ours cannot: the message of the error, so that a fix requires removing it from this list
CANNOT = {
    "test_expanded_weights": "use torch.func's vmap and grad"
}  # PyTorch's per-sample gradients know its own LSTM alone
if no_kernel_for("cpu", torch.float64) is None:  # else these tensors go to PyTorch's path, which has one
    CANNOT["test_forward_mode"] = "have no forward derivative"


def fails_with(text):
    def decorator(test):
        @functools.wraps(test)
        def wrapper(self, *args, **kwargs):
            with pytest.raises(Exception, match=text):
                test(self, *args, **kwargs)

        return wrapper

    return decorator


(THEIRS,) = (info for info in module_db if info.module_cls is nn.LSTM)
OURS = ModuleInfo(
    triton_lstm.LSTM,
    module_inputs_func=THEIRS.module_inputs_func,
    module_error_inputs_func=THEIRS.module_error_inputs_func,
    train_and_eval_differ=THEIRS.train_and_eval_differ,
    decorators=[DecorateInfo(fails_with(text), "TestLSTM", name, device_type="cpu") for name, text in CANNOT.items()],
)
in_both_modes = modules([OURS])
in_training = modules([OURS], train_eval_mode=TrainEvalMode.train_only)
in_float32 = modules([OURS], train_eval_mode=TrainEvalMode.train_only, allowed_dtypes=[torch.float32])
in_float64 = modules([OURS], train_eval_mode=TrainEvalMode.train_only, allowed_dtypes=[torch.float64])


def detached(tree, device=None):
    """A copy of a tree of tensors; those that are floating point require a gradient."""
    return tree_map(lambda t: t.detach().to(device or t.device, copy=True).requires_grad_(), tree)


def trees(module, args):
    """The outputs, and the gradients of what `args` and the parameters hold."""
    args = detached(args, next(module.parameters()).device)
    outputs = module(*args)
    wanted = [*tree_leaves(args), *module.parameters()]
    return outputs, torch.autograd.grad(sum(t.square().sum() for t in tree_leaves(outputs)), wanted)


def close(device, dtype):
    if torch.device(device).type == "cuda":
        return dict(rtol=1e-2, atol=1e-3)
    return dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-10, atol=1e-12)


def assert_same(got, expected, device, dtype):
    got, expected = (tree_map(lambda t: t.detach().cpu(), tree) for tree in (got, expected))
    torch.testing.assert_close(got, expected, **close(device, dtype))


def assert_equal(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def samples(info, device, dtype, training):
    """PyTorch's samples: what the module is built with, our module, nn.LSTM on the CPU with its weights, arguments."""
    samples = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=False, training=training)
    assert len(samples) >= 32
    for sample in samples:
        built = sample.constructor_input
        assert not built.args and not sample.forward_input.kwargs
        ours = info.module_cls(**built.kwargs, device=device, dtype=dtype).train(training)
        theirs = nn.LSTM(**built.kwargs, dtype=dtype).train(training)
        theirs.load_state_dict(ours.state_dict())
        yield sample, ours, theirs, sample.forward_input.args


def few(info, device, dtype, training):
    """Every fifth: each value of each argument, not each combination."""
    return list(samples(info, device, dtype, training))[::5]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
class TestLSTM(TestCase):
    @in_training
    def test_forward(self, device, dtype, module_info, training):
        for sample, ours, theirs, args in samples(module_info, device, dtype, training):
            assert_same(trees(ours, args), trees(theirs, args), device, dtype)
            assert_same(ours(*args), sample.reference_fn(ours, *args), device, dtype)

    def _error(self, info, device, dtype, training):
        return info.module_error_inputs_func(info, device=device, dtype=dtype, requires_grad=False, training=training)

    @in_both_modes
    def test_errors(self, device, dtype, module_info, training):
        for error in self._error(module_info, device, dtype, training):
            built, called = error.module_error_input.constructor_input, error.module_error_input.forward_input
            if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
                with pytest.raises(error.error_type, match=error.error_regex):
                    module_info.module_cls(*built.args, **built.kwargs)
            else:
                module = module_info.module_cls(*built.args, **built.kwargs).train(training)
                with pytest.raises(error.error_type, match=error.error_regex):
                    module(*called.args, **called.kwargs)

    @in_training
    def test_factory_kwargs(self, device, dtype, module_info, training):
        for sample, ours, _, _ in samples(module_info, device, dtype, training):
            assert {(p.device, p.dtype) for p in ours.parameters()} == {(torch.device(device), dtype)}
            module = module_info.module_cls(**sample.constructor_input.kwargs, device="meta", dtype=torch.float16)
            assert all(p.is_meta and p.dtype == torch.float16 for p in module.parameters())

    @in_float32
    def test_repr(self, device, dtype, module_info, training):
        for _, ours, theirs, _ in samples(module_info, device, dtype, training):
            assert (repr(ours), str(ours)) == (repr(theirs), str(theirs))

    @in_float32
    def test_pickle_and_deepcopy(self, device, dtype, module_info, training):
        def saved(module):
            buffer = io.BytesIO()
            torch.save(module, buffer)
            return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)

        for _, ours, _, args in few(module_info, device, dtype, training):
            expected = trees(ours, args)
            for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), saved(ours)):
                assert_equal(trees(twin, args), expected)

    @in_float32
    def test_save_and_load_state_dict(self, device, dtype, module_info, training):
        for sample, ours, _, args in few(module_info, device, dtype, training):
            buffer = io.BytesIO()
            torch.save(ours.state_dict(), buffer)
            twin = module_info.module_cls(**sample.constructor_input.kwargs, device=device, dtype=dtype).train(training)
            twin.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
            assert_equal(trees(twin, args), trees(ours, args))

    @in_float32
    def test_non_contiguous_tensors(self, device, dtype, module_info, training):
        """Inputs, states and weights, all at once; PyTorch expects cuDNN to fail here."""
        for _, ours, theirs, args in few(module_info, device, dtype, training):
            expected = trees(theirs, args)
            with torch.no_grad():
                for p in ours.parameters():
                    p.data = noncontiguous_like(p.data)
            assert not any(p.is_contiguous() for p in ours.parameters())
            loose = tree_map(lambda t: noncontiguous_like(t).requires_grad_(), args)
            outputs = ours(*loose)
            wanted = [*tree_leaves(loose), *ours.parameters()]
            gradients = torch.autograd.grad(sum(t.square().sum() for t in tree_leaves(outputs)), wanted)
            assert_same((outputs, gradients), expected, device, dtype)

    def _as_function(self, module, args):
        """`module` as a function of flat tensors, arguments first, and those tensors."""
        names = [name for name, _ in module.named_parameters()]
        leaves, spec = torch.utils._pytree.tree_flatten(detached(args))

        def function(*tensors):
            weights = dict(zip(names, tensors[len(leaves) :], strict=True))
            called = torch.utils._pytree.tree_unflatten(tensors[: len(leaves)], spec)
            return tuple(tree_leaves(torch.func.functional_call(module, weights, called)))

        return function, (*leaves, *detached(list(module.parameters())))

    @onlyCPU
    @in_float64
    def test_grad(self, device, dtype, module_info, training):
        for _, ours, _, args in few(module_info, device, dtype, training)[1::4]:
            assert gradcheck(*self._as_function(ours, args), fast_mode=True, check_batched_grad=False)

    @onlyCPU
    @in_float64
    def test_gradgrad(self, device, dtype, module_info, training):
        """Of the smallest sample; tests/operator/test_autograd.py has the projection and both directions."""
        _, ours, _, args = next(samples(module_info, device, dtype, training))
        assert gradgradcheck(*self._as_function(ours, args), fast_mode=True, check_batched_grad=False)

    @onlyCPU
    @in_float64
    def test_batched_grad(self, device, dtype, module_info, training):
        for _, ours, theirs, args in few(module_info, device, dtype, training):
            results = []
            for module in (theirs, ours):
                output = module(*args)[0]
                cotangents = torch.eye(output.numel(), dtype=dtype).view(-1, *output.shape)
                results.append(
                    torch.autograd.grad(output, list(module.parameters()), cotangents, is_grads_batched=True)
                )
            assert_same(results[1], results[0], device, dtype)

    @onlyCPU
    @in_float64
    def test_forward_mode(self, device, dtype, module_info, training):
        for _, ours, theirs, args in few(module_info, device, dtype, training):
            with forward_ad.dual_level():
                duals = tree_map(lambda t: forward_ad.make_dual(t, torch.ones_like(t)), args)
                expected = [forward_ad.unpack_dual(t).tangent for t in tree_leaves(theirs(*duals))]
                got = [forward_ad.unpack_dual(t).tangent for t in tree_leaves(ours(*duals))]
            assert_same(got, expected, device, dtype)

    @onlyCPU
    @in_float64
    def test_expanded_weights(self, device, dtype, module_info, training):
        results = []
        x = torch.randn(4, 5, 2, dtype=dtype)
        theirs, ours = (cls(2, 3, batch_first=True, dtype=dtype) for cls in (nn.LSTM, module_info.module_cls))
        ours.load_state_dict(theirs.state_dict())
        for module in (theirs, ours):
            call_for_per_sample_grads(module, batch_size=4)(x)[0].sum().backward()
            results.append([p.grad_sample for p in module.parameters()])
        assert_same(results[1], results[0], device, dtype)

    @in_float32
    def test_memory_format(self, device, dtype, module_info, training):
        for _, ours, _, args in few(module_info, device, dtype, training):
            expected = trees(ours, args)
            for memory_format in (torch.channels_last, torch.channels_last_3d):
                assert_equal(trees(ours.to(memory_format=memory_format), args), expected)

    @in_float32
    def test_to_other_dtypes_and_back(self, device, dtype, module_info, training):
        self.addCleanup(torch.__future__.set_swap_module_params_on_conversion, False)
        for _, ours, _, args in few(module_info, device, dtype, training)[::3]:
            for swap in (False, True):
                torch.__future__.set_swap_module_params_on_conversion(swap)
                parameters, expected = list(ours.parameters()), trees(ours, args)
                ours.to(torch.float64)
                assert all(p.dtype == torch.float64 for p in ours.parameters())
                assert all(a is b for a, b in zip(parameters, ours.parameters(), strict=True))
                trees(ours, tree_map(lambda t: t.double(), args))
                assert_equal(trees(ours.to(dtype), args), expected)
            torch.__future__.set_swap_module_params_on_conversion(False)

    @in_float32
    def test_to_empty_from_meta(self, device, dtype, module_info, training):
        for sample, ours, _, args in few(module_info, device, dtype, training):
            module = module_info.module_cls(**sample.constructor_input.kwargs, device="meta", dtype=dtype)
            with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
                module.to(device)
            module.to_empty(device=device)
            module.load_state_dict(ours.state_dict())
            assert_equal(trees(module, args), trees(ours, args))

    @in_float32
    def test_train_and_eval(self, device, dtype, module_info, training):
        for _, ours, _, args in few(module_info, device, dtype, training):
            expected = trees(ours, args)
            parent = nn.Sequential(ours).eval()
            assert not ours.training
            assert_equal(trees(ours, args), expected)
            assert parent.train() and ours.training

    @onlyCUDA
    @in_training
    def test_from_one_device_to_another(self, device, dtype, module_info, training):
        for _, ours, theirs, args in samples(module_info, device, dtype, training):
            there = tree_map(lambda t: t.cpu(), args)
            assert_same(trees(ours.cpu(), there), trees(theirs, there), "cpu", dtype)
            assert all(ref() is p for ref, p in zip(ours._flat_weight_refs, ours.parameters(), strict=True))
            assert_same(trees(ours.to(device), args), trees(theirs, args), device, dtype)


instantiate_device_type_tests(TestLSTM, globals(), only_for=("cpu", "cuda"))
