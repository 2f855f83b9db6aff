"""A repair of vLLM's sampling at temperature > 0 with a draft, on CPU.

vLLM spreads each request's temperature over its drafted tokens with a kernel. Its CPU stand-in
(seen in vLLM 0.32.0, vllm-project/vllm issue 55005) writes to a copy and leaves the result as
uninitialised memory, so that drafted tokens are judged by a random temperature and the output does
not follow the target's distribution. Our distribution test found it. Greedy decoding does not come
this way.
"""

from __future__ import annotations

from typing import Any


def repair_cpu_sampler() -> bool:
    """Replace the spreading in this process where it is wrong; whether that was so.

    Call it in the process that runs the model, once the engine has loaded its kernels.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    import torch
    from vllm.v1.sample import rejection_sampler

    given, ends = torch.tensor([0.25, 0.0, 1.5]), torch.tensor([1, 3, 6], dtype=torch.int32)
    wanted = spread(given, ends, 6, 0, 1)
    if torch.equal(rejection_sampler.expand_batch_to_tokens(given, ends, 6, 0, 1), wanted):
        return False
    rejection_sampler.expand_batch_to_tokens = spread
    return True


def spread(
    x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Any:
    """[batch] values repeated for each request's tokens, as vLLM's `expand_batch_to_tokens`.

    `cu_num_tokens` [batch] are running sums of tokens per request; one value is replaced.
    """
    import torch

    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return values.repeat_interleave(counts, output_size=num_tokens)


def repair_cpu_generators() -> bool:
    """Let requests with seeds of their own be prefilled in pieces, in this process; whether so.

    vLLM throws away the token that is sampled behind all but the last piece, and winds the
    request's generator back, which those of a CPU cannot (seen in vLLM 0.32.0: "CPU Generator does
    not use offset" ends the engine). Ours are not wound back: what is drawn later is drawn from
    further on, which is as random.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    import torch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    class Unwound(torch.Generator):
        def get_offset(self) -> int:
            return 0

        def set_offset(self, offset: int) -> None:
            pass

    given = GPUModelRunner._update_states

    def update_states(self: Any, *arguments: Any, **named: Any) -> Any:
        found = given(self, *arguments, **named)
        batch = self.input_batch
        for place, generator in list(batch.generators.items()):
            if type(generator) is torch.Generator:
                ours = Unwound(device=generator.device)
                ours.set_state(generator.get_state())
                batch.generators[place] = ours
                self.requests[batch.req_ids[place]].generator = ours
        return found

    GPUModelRunner._update_states = update_states
    return True
