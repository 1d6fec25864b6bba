#!/bin/sh
# Compares the committed OpenAPI document with what the types generate.
set -eu
cd "$(dirname "$0")/.."
generated=$(mktemp)
trap 'rm -f "$generated"' EXIT
cargo run --quiet --release --locked --package drover -- openapi > "$generated"
if ! diff -u docs/openapi.json "$generated"; then
    echo "docs/openapi.json is out of date: run make openapi and commit it" >&2
    exit 1
fi
