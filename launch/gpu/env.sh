# shellcheck shell=bash
# Settings of XLA, JAX and NCCL for training on NVIDIA GPUs, all in one place. Sourced by launch/gpu/run.sh, or by hand
# before any other command. Variables that are already set win. DETERMINISTIC=1 makes results the same bit for bit.
#
# No step was timed with these, because no GPU was at hand; the comments say what compiled programs show. XLA ends the
# process on a flag that it does not know: tests/system/gpu_launch_test.py starts the installed jaxlib with these.

# Overlaps collectives with matrix products, also those of the layer before or after. In llama:1b's step for 8 x H100
# (fsdp 8, 8 sequences of 2048 each, jax 0.12.0.1) 38 of 45 collectives have products between their start and their end,
# by default 5 of 18; the peak is 5.06 GiB instead of 5.00; compilation takes 32 s instead of 19.
export JAX_OPTIMIZATION_LEVEL=${JAX_OPTIMIZATION_LEVEL:-O1}

if [[ -n ${DETERMINISTIC:-} ]]; then
  # No scatter or reduction by atomics, whose order differs from run to run, and no autotuning, which may choose another
  # kernel after a restart. The step becomes slower (docs/reliability.md).
  xla="--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
  # The user's flags come last, because the last of a repeated flag counts. A value without -- names a file of flags.
  if [[ -z ${XLA_FLAGS:-} || $XLA_FLAGS == *--* ]]; then
    export XLA_FLAGS="$xla${XLA_FLAGS:+ $XLA_FLAGS}"
  else
    printf 'warning: XLA_FLAGS=%s names a file; add to it: %s\n' "$XLA_FLAGS" "$xla" >&2
  fi
  unset xla
  # A ring adds in the order of its ranks. NVLink SHARP adds in the switch, in the order of arrival.
  export NCCL_ALGO=${NCCL_ALGO:-Ring}
fi

# If the CUDA plugin does not work, JAX then fails and says why; otherwise it would fall back to the CPU with a warning.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}

# Prints NCCL's warnings, which it hides by default. INFO shows which networks and rings it uses.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Left to defaults, and why:
#   XLA_PYTHON_CLIENT_MEM_FRACTION     launch.train takes 92 % of each GPU
#   NCCL_PROTO, NCCL_ALGO, NCCL_NVLS_ENABLE, NCCL_MIN_NCHANNELS
#                                      NCCL chooses by the topology it finds; a manual choice suits one machine only
#   NCCL_SOCKET_IFNAME, NCCL_IB_HCA    differ from site to site. Set the first to the network between the nodes, such as
#                                      eth0, if NCCL takes the wrong one (docker0) and hangs or fails to connect
#   CUDA_DEVICE_MAX_CONNECTIONS        1 was faster with older schedulers on Hopper; on Blackwell it is slower
#   --xla_gpu_enable_latency_hiding_scheduler, --xla_gpu_enable_pipelined_*,
#   --xla_gpu_enable_while_loop_double_buffering
#                                      O1 does what they do. Only setting the first changes nothing in the program above
#   --xla_gpu_*_combine_threshold_bytes
#                                      XLA has defaults by size; worth trying for one model on one machine, with
#                                      python -m launch.bench --trace
#   --xla_gpu_enable_command_buffer    on by default for what it suits
#   --xla_gpu_enable_nccl_user_buffers takes memory beside the 92 %
#   --xla_gpu_executable_terminate_timeout
#                                      our watchdog ends a step that hangs, with the stacks of all threads
