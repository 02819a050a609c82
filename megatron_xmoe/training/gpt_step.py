"""Data sets, batches and loss of GPT pretraining: what stock Megatron keeps outside its wheel."""

import json
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer, print_rank_0
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
# everything that Megatron's batch functions look up, packed sequences included
_ALL_KEYS = (*BATCH_KEYS, "cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")
# a loss of more than this many times the largest seen so far is reported with --check-for-spiky-loss
SPIKY_LOSS_FACTOR = 10


def get_batch(data_iterator, vp_stage: int | None, micro_batch_size: int) -> tuple[Tensor | None, ...]:
    """The next micro-batch on this rank: tokens, labels, loss mask, attention mask, position ids.

    Each [B, S] (the attention mask [B, 1, S, S] bool, True where hidden); None where this pipeline stage does not need
    it. Tensor-parallel rank 0 reads, the others receive.
    """
    args, predicts_further = get_args(), _predicts_further_tokens(vp_stage)
    if not is_first_or_last_pipeline_stage(vp_stage) and not predicts_further:
        return (None,) * len(BATCH_KEYS)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {key: _to_device(sample.get(key)) for key in _ALL_KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=predicts_further,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    if args.context_parallel_size > 1:
        batch = get_batch_on_this_cp_rank(
            batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group()
        )
    return tuple(batch[key] for key in BATCH_KEYS)


def _predicts_further_tokens(vp_stage: int | None) -> bool:
    """Whether this stage has layers of multi-token prediction, which embed the tokens once more."""
    args = get_args()
    if not args.mtp_num_layers:
        return False
    layout = args.pipeline_model_parallel_layout
    if layout is not None:
        layout = PipelineParallelLayerLayout(layout, args.pipeline_model_parallel_size)
    return mtp_on_this_rank(layout, args.mtp_num_layers, ignore_virtual=vp_stage is None, vp_stage=vp_stage)


def _to_device(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cuda(non_blocking=True)


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Masked sum of the token losses.

    Args:
        loss_mask, losses: [B, S].

    Returns:
        The sum; the number of tokens in it (int); {'lm loss': [sum, tokens]} for the logger, which divides.
    """
    args = get_args()
    loss_mask = loss_mask.reshape(-1).float()
    loss = torch.sum(losses.reshape(-1).float() * loss_mask)
    if args.check_for_nan_in_loss_and_grad:
        _reject(loss, torch.isnan, "found NaN in local forward loss calculation", fatal=True)
        _reject(loss, torch.isinf, "found Inf in local forward loss calculation", fatal=True)
    if args.check_for_spiky_loss:
        unexpected = partial(
            get_rerun_state_machine().is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
        )
        _reject(loss, unexpected, "Spiky loss", fatal=False)
    num_tokens = loss_mask.sum().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}


def _reject(loss: Tensor, rejection_func, message: str, fatal: bool) -> None:
    get_rerun_state_machine().validate_result(
        result=loss, rejection_func=rejection_func, message=message, tolerance=0.0, fatal=fatal
    )


_stragglers = StragglerDetector()
_begun = False


def training_has_begun() -> bool:
    """Whether a forward pass was started: until then, errors are most likely the user's."""
    return _begun


def forward_step(data_iterator, model):
    """One micro-batch through this pipeline stage, as Megatron's schedules call it.

    Returns:
        The stage's output (token losses [B, S] on the last) and the function that reduces it.
    """
    global _begun
    _begun = True
    args, timers = get_args(), get_timers()
    timers("batch-generator", log_level=2).start()
    with _stragglers(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        tokens, labels, loss_mask, attention_mask, position_ids = get_batch(
            data_iterator, vp_stage, args.micro_batch_size if model.training else args.eval_micro_batch_size
        )
    timers("batch-generator").stop()
    with _stragglers:
        output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


def dataset_config(args) -> GPTDatasetConfig:
    """Megatron's configuration of a GPT data set from the arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences_per_dataset = json.load(file)
    options = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "multiple_validation_sets": args.multiple_validation_sets,
        "full_validation": args.full_validation,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "path_to_cache": args.data_cache_path,
        "mmap_bin_files": args.mmap_bin_files,
        "tokenizer": get_tokenizer(),
        "reset_position_ids": args.reset_position_ids,
        "reset_attention_mask": args.reset_attention_mask,
        "eod_mask_loss": args.eod_mask_loss,
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "object_storage_cache_path": args.object_storage_cache_path,
        "mid_level_dataset_surplus": args.mid_level_dataset_surplus,
        "allow_ambiguous_pad_tokens": args.allow_ambiguous_pad_tokens,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "sequences_per_dataset": sequences_per_dataset,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "context_parallel_size": args.context_parallel_size,
    }
    if not args.fim_data:
        return GPTDatasetConfig(**options)
    return GPTFIMDatasetConfig(
        **options,
        fim_rate=args.fim_rate,
        fim_spm_rate=args.fim_spm_rate,
        fim_split_sample=args.fim_split_sample,
        fim_fragment_rate=args.fim_fragment_rate,
        fim_no_prefix=args.fim_no_prefix,
        fim_extra_tokens={
            name: getattr(args, f"fim_{name}_token") for name in ("prefix", "middle", "suffix", "pad", "eod")
        },
    )


def _is_built_here(vp_stage: int | None = None) -> bool:
    needed = is_first_or_last_pipeline_stage(vp_stage) or _predicts_further_tokens(vp_stage)
    return needed and parallel_state.get_tensor_model_parallel_rank() == 0


def datasets_provider(num_samples, vp_stage: int | None = None):
    """Train, validation and test sets for Megatron's loop; `num_samples` is the number of samples of each."""
    args = get_args()
    dataset_class = MockGPTDataset if args.mock_data else GPTFIMDataset if args.fim_data else GPTDataset
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    builder = BlendedMegatronDatasetBuilder(
        dataset_class, num_samples, partial(_is_built_here, vp_stage=vp_stage), dataset_config(args)
    )
    return builder.build()


datasets_provider.is_distributed = True  # every rank calls it; the builder decides who reads
