#!/usr/bin/env bash
# recipes/launch/server.sh MODEL WEIGHTS_FOLDER
# A server that generates on the first GPU, while the trainer runs on the others:
#
#   engine = EndpointEngine("http://localhost:30000/v1", "policy",
#                           weights=SaveAndReload.sglang("http://localhost:30000/v1", WEIGHTS_FOLDER))
#   CandidateResampler(reward, engine=engine, ...)
#
# Before each round the trainer saves the model to WEIGHTS_FOLDER, which both see, and asks the server to load it. With
# vLLM, `SaveAndReload.vllm_lora` does this for an adapter:
#
#   CUDA_VISIBLE_DEVICES=0 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve "$MODEL" --port 30000 --enable-lora
set -euo pipefail

MODEL=$1
WEIGHTS_FOLDER=$2
mkdir -p "$WEIGHTS_FOLDER"
CUDA_VISIBLE_DEVICES=0 exec python -m sglang.launch_server \
    --model-path "$MODEL" --served-model-name policy --host 0.0.0.0 --port 30000
