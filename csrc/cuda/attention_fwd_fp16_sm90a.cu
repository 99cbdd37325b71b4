// Attention's forward in fp16 (attention_fwd_sm90a.cuh).
#include "attention_fwd_sm90a.cuh"

ILLADA_ATTENTION_FWD(illada_attention_fwd_fp16_sm90a, run_any<fp16>)
