#!/usr/bin/env bash
# Builds the fuzz targets and runs each of them: fuzz/run.sh [SECONDS [TARGET...]]
#
# SECONDS per target (300). Prints a table, fails when a target crashes, hangs or eats memory, and
# leaves the input that did it in fuzz/artifacts/. FUZZ_JOBS targets run at a time (one per core).
# What the runs learn stays in fuzz/target/corpus/ and is where the next ones begin.
set -euo pipefail
cd "$(dirname "$0")"

readonly TRIPLE=x86_64-unknown-linux-gnu
readonly FUZZ=$PWD/target/$TRIPLE/debug/fuzz
# One input may take so many seconds and MiB: hundreds of times what any of them needs.
readonly INPUT_SECONDS=20 MEMORY_MIB=2048 INPUT_BYTES=4096

# What cargo-fuzz would pass: coverage for libFuzzer, and the address sanitizer. Both are unstable
# options, which the stable compiler takes when it is told to.
build() {
    local flags=(
        --cfg fuzzing
        -Zsanitizer=address
        -Ccodegen-units=1
        -Cpasses=sancov-module
        -Cllvm-args=-sanitizer-coverage-level=4
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
        -Cllvm-args=-sanitizer-coverage-pc-table
        -Cllvm-args=-sanitizer-coverage-trace-compares
    )
    env -u CARGO_TARGET_DIR -u CARGO_ENCODED_RUSTFLAGS RUSTC_BOOTSTRAP=1 RUSTFLAGS="${flags[*]}" \
        cargo build --locked --target "$TRIPLE"
}

# Runs target $1 for $2 seconds and prints its row. A failure says what libFuzzer said.
run_target() {
    local name=$1 seconds=$2 result=ok
    local corpus=target/corpus/$name seeds=target/seeds/$name log=target/logs/$name.log
    rm -rf "$seeds"
    mkdir -p "$corpus" "$seeds" "artifacts/$name" target/logs
    local folders=("$corpus" "$seeds")
    [[ ! -d regressions/$name ]] || folders+=("regressions/$name")
    FUZZ_TARGET=$name FUZZ_SEEDS=$seeds "$FUZZ" >"$log" 2>&1 || result="no seeds"
    # The outer limit is for an input that hangs beyond the engine's help.
    local limits=(-max_total_time="$seconds" -timeout="$INPUT_SECONDS"
        -rss_limit_mb="$MEMORY_MIB" -max_len="$INPUT_BYTES")
    if [[ $result == ok ]]; then
        FUZZ_TARGET=$name timeout --kill-after=10 $((seconds + 120)) "$FUZZ" "${limits[@]}" \
            -print_final_stats=1 -artifact_prefix="artifacts/$name/" "${folders[@]}" \
            >"$log" 2>&1 || result="FAILED ($?)"
    fi
    row "$name" "$log" "$result"
    [[ $result != ok ]] || return 0
    report "$name" "$log" >&2
    return 1
}

# What went wrong, where, and with which input. The log has it all.
report() {
    printf '\n%s failed; from fuzz/%s:\n' "$1" "$2"
    grep -E -m1 -A20 'panicked at|ERROR: |^fuzz: ' "$2" || tail -n 20 "$2"
    grep -E '^(artifact_prefix|Base64)' "$2" || true
}

row() {
    awk -v name="$1" -v result="$3" '
        / cov: / { for (i = 1; i < NF; i++) value[$i] = $(i + 1) }
        /^stat::number_of_executed_units/ { execs = $2 }
        /^stat::average_exec_per_sec/ { rate = $2 }
        END {
            split(value["corp:"], corpus, "/")
            printf "%-16s %10d %9d %9d %8d  %s\n",
                name, execs, rate, value["cov:"], corpus[1], result
        }' "$2"
}

main() {
    local seconds=${1:-300}
    [[ $seconds =~ ^[1-9][0-9]*$ ]] || { echo "usage: fuzz/run.sh [SECONDS [TARGET...]]" >&2; exit 2; }
    shift || true
    build
    local known targets=("$@")
    known=$(FUZZ_TARGET=list "$FUZZ")
    [[ $# -gt 0 ]] || mapfile -t targets <<<"$known"
    local name
    for name in "${targets[@]}"; do
        grep -qxF -- "$name" <<<"$known" || { echo "no target is named $name; there are:" $known >&2; exit 2; }
    done
    printf '%-16s %10s %9s %9s %8s  %s\n' target execs execs/s coverage corpus result
    export -f run_target report row
    export FUZZ INPUT_SECONDS MEMORY_MIB INPUT_BYTES
    printf '%s\n' "${targets[@]}" |
        xargs -P "${FUZZ_JOBS:-$(nproc)}" -I{} bash -euo pipefail -c 'run_target "$1" "$2"' fuzz {} "$seconds"
}

main "$@"
