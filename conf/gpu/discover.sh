#!/bin/sh
# Tells Spark the GPUs of this node, or of this container: {"name": "gpu", "addresses": ["0","1"]}. They are those that
# nvidia-smi lists; of them, where CUDA_VISIBLE_DEVICES is set, those that it names, as it names them. Without any the list
# is empty, and Spark says how many it was to find.
gpus=$(nvidia-smi --query-gpu=index,uuid --format=csv,noheader 2>/dev/null) || gpus=
if [ -z "$gpus" ]; then
  found=
elif [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
  found=$(echo "$gpus" | cut -d, -f1)
else
  names=$(echo "$gpus" | tr -d ' ' | tr ',' '\n')
  found=$(echo "$CUDA_VISIBLE_DEVICES" | tr -d ' ' | tr ',' '\n' | while read -r gpu; do
    # CUDA ignores what comes behind a device that is not there. Slices of a GPU (MIG) are not in the list of GPUs.
    case $gpu in MIG-*) ;; *) echo "$names" | grep -qxF -e "$gpu" || break ;; esac
    echo "$gpu"
  done)
fi
echo "$found" | sed '/^$/d; s/.*/"&"/' | paste -sd, - | sed 's/.*/{"name": "gpu", "addresses": [&]}/'
