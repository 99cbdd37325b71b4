// Attention's forward in bf16 (attention_fwd_sm90a.cuh).
#include "attention_fwd_sm90a.cuh"

ILLADA_ATTENTION_FWD(illada_attention_fwd_bf16_sm90a, run_any<bf16>)
