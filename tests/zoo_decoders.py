"""Decoders of the transformers library: attention, state space, mixture of experts."""

from __future__ import annotations

from zoo_transformers import GROUPED, SMALL, token_model

LLAMA = token_model(
    "llama",
    "LlamaForCausalLM",
    "LlamaConfig",
    GROUPED,
    depths=(8,),
    counted_in="LlamaDecoderLayer.forward: 2 x `residual + hidden_states`, 4 layers",
)
QWEN3 = token_model(
    "qwen3",
    "Qwen3ForCausalLM",
    "Qwen3Config",
    {**GROUPED, "head_dim": 8},
    depths=(8,),
    counted_in="Qwen3DecoderLayer.forward: 2 x `residual + hidden_states`, 4 layers",
)
MIXTRAL = token_model(
    "mixtral",
    "MixtralForCausalLM",
    "MixtralConfig",
    {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    depths=(8,),
    counted_in="MixtralDecoderLayer.forward: 2 x `residual + hidden_states`, 4 layers",
)
GEMMA3 = token_model(
    "gemma3",
    "Gemma3ForCausalLM",
    "Gemma3TextConfig",
    {
        **GROUPED,
        "head_dim": 8,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    depths=(8,),
    counted_in="Gemma3DecoderLayer.forward: 2, each branch normed after its sublayer, 4 layers",
)
GPT2 = token_model(
    "gpt2",
    "GPT2LMHeadModel",
    "GPT2Config",
    {
        "vocab_size": 96,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    depths=(8,),
    counted_in="GPT2Block.forward: `attn_output + residual`, `residual + feed_forward`, 4 blocks",
)
GPT_NEOX = token_model(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "GPTNeoXConfig",
    {**SMALL, "use_parallel_residual": True},
    depths=(4,),
    counted_in="GPTNeoXLayer.forward: `(mlp + attn) + x` sums the branches first, 4 layers",
)
GPT_NEOX_SEQUENTIAL = token_model(
    "gpt_neox_sequential",
    "GPTNeoXForCausalLM",
    "GPTNeoXConfig",
    {**SMALL, "use_parallel_residual": False},
    depths=(8,),
    counted_in="GPTNeoXLayer.forward: `attn + x` and `mlp + attn`, 4 layers",
)
FALCON = token_model(
    "falcon",
    "FalconForCausalLM",
    "FalconConfig",
    {**SMALL, "new_decoder_architecture": False, "parallel_attn": True, "alibi": False},
    depths=(4,),
    counted_in="FalconDecoderLayer.forward: `mlp_output += attention_output`, then one "
    "dropout_add, 4 layers",
)
FALCON_NEW = token_model(
    "falcon_new_decoder_architecture",
    "FalconForCausalLM",
    "FalconConfig",
    {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    depths=(4,),
    counted_in="FalconDecoderLayer.forward: two norms read x, one dropout_add, 4 layers",
)
FALCON_SEQUENTIAL = token_model(
    "falcon_sequential",
    "FalconForCausalLM",
    "FalconConfig",
    {
        **SMALL,
        "new_decoder_architecture": False,
        "parallel_attn": False,
        "multi_query": False,
        "alibi": True,
    },
    depths=(8,),
    counted_in="FalconDecoderLayer.forward: 2 x dropout_add, 4 layers",
)
OPT = token_model(
    "opt",
    "OPTForCausalLM",
    "OPTConfig",
    {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    depths=(8,),
    counted_in="OPTDecoderLayer.forward: 2 x `residual + hidden_states`, 4 layers",
)
BLOOM = token_model(
    "bloom",
    "BloomForCausalLM",
    "BloomConfig",
    {"vocab_size": 96, "hidden_size": 32, "n_layer": 4, "n_head": 4},
    depths=(8,),
    counted_in="BloomAttention.forward, BloomMLP.forward: one dropout_add each, 4 blocks",
)
GRANITE = token_model(
    "granite",
    "GraniteForCausalLM",
    "GraniteConfig",
    {**GROUPED, "residual_multiplier": 0.22, "embedding_multiplier": 12.0},
    depths=(8,),
    counted_in="GraniteDecoderLayer.forward: 2 x `residual + hidden_states * multiplier`, 4 layers",
)
KIMI_LINEAR = token_model(
    "kimi_linear",
    "KimiLinearForCausalLM",
    "KimiLinearConfig",
    {
        **SMALL,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    depths=(6,),
    counted_in="KimiLinearDecoderLayer.forward: 2, 3 layers; `hidden_states + shared_experts(...)` "
    "in the mixture of experts sums two branches",
)
MAMBA = token_model(
    "mamba",
    "MambaForCausalLM",
    "MambaConfig",
    {
        "vocab_size": 96,
        "hidden_size": 32,
        "state_size": 4,
        "num_hidden_layers": 4,
        "time_step_rank": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    depths=(4,),
    float64_tolerance=1e-6,
    counted_in="MambaBlock.forward: 1, 4 layers; the scan's `y + x * D` has no state as operand",
)
INKLING2 = token_model(
    "inkling2",
    "Inkling2ForCausalLM",
    "Inkling2TextConfig",
    {
        "vocab_size": 96,
        "unpadded_vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 4,
        "d_rel": 4,
        "rel_extent": 8,
        "max_position_embeddings": 64,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_layers_per_attn_res_block": 2,
        "eos_token_id": 2,
    },
    depths=(),
    refused="already",
    counted_in="Inkling2BlockAttentionResidual mixes the sources of every sublayer",
)


DECODER_CASES = (
    LLAMA,
    QWEN3,
    MIXTRAL,
    GEMMA3,
    GPT2,
    GPT_NEOX,
    GPT_NEOX_SEQUENTIAL,
    FALCON,
    FALCON_NEW,
    FALCON_SEQUENTIAL,
    OPT,
    BLOOM,
    GRANITE,
    KIMI_LINEAR,
    MAMBA,
)
DECODER_REFUSED = (INKLING2,)
