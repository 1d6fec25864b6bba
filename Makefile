# Drover's commands. `make help` lists them.

CARGO ?= cargo
PREFIX ?= /usr/local
# Seconds that `make fuzz` gives each target, and `make test` in its short round.
FUZZ_SECONDS ?= 300
FUZZ_SMOKE_SECONDS ?= 3
# Migrations of each chain, and kills in all, in `make test-migrate-long`.
MIGRATIONS ?= 100
KILLS ?= 200

.DEFAULT_GOAL := help
.PHONY: help deps build demo demo-gpu test test-unit test-kvm test-migrate-long test-gpu-migrate-long test-lab test-fuzz bench bench-migrate bench-gpu-migrate fuzz \
        lint deny doc openapi ci install

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-23s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

deps: ## Install the Debian packages that building and testing need
	@packaging/install-packages.sh packaging/packages-build.txt packaging/packages-test.txt \
	    tests/lab/packages.txt

deps-build:
	@packaging/install-packages.sh packaging/packages-build.txt

build: deps-build ## Build the drover binary, target/release/drover
	$(CARGO) build --release --locked --package drover

demo: build ## Boot the built-in guest and move it to a second process, live
	target/release/drover demo

demo-gpu: build ## Divide a model GPU, give its parts to a running VM, compute; move a VM with one
	$(CARGO) build --locked --package tests --bins
	target/debug/demo_gpu

test: deps lint deny test-unit test-kvm test-lab test-fuzz doc ## Set up everything and run all tests

test-unit: ## Tests that need no KVM
	$(CARGO) test --workspace --locked --exclude tests
	$(CARGO) test --locked --package tests --lib --test architecture --test model_gpu

test-kvm: build ## Tests on this machine's /dev/kvm
	$(CARGO) build --locked --package vmm --examples
	$(CARGO) test --locked --package tests --test 'kvm_*'

test-migrate-long: build ## Migrations by the hundred, and 200 kills of either side (minutes)
	DROVER_MIGRATIONS=$(MIGRATIONS) DROVER_KILLS=$(KILLS) $(CARGO) test --locked --package tests \
	    --test kvm_migrate --test kvm_migrate_kill

test-gpu-migrate-long: build ## Moves of VMs with model GPUs by the dozen, and with 2 GiB of video memory (minutes)
	DROVER_GPU_MIGRATIONS=50 $(CARGO) test --locked --package tests --test kvm_migrate_gpu --test kvm_migrate_gpu_faults
	DROVER_GPU_MIGRATIONS=5 DROVER_GPU_VRAM_MIB=2048 $(CARGO) test --locked --package tests --test kvm_migrate_gpu many

test-lab: build ## Real Linux guests in a nested lab under QEMU's software emulation
	$(CARGO) build --locked --package tests --bins
	DROVER_BIN=$(CURDIR)/target/release/drover target/debug/lab

test-fuzz: ## Every fuzz target for a few seconds
	fuzz/run.sh $(FUZZ_SMOKE_SECONDS)

fuzz: ## Every fuzz target for FUZZ_SECONDS (300)
	fuzz/run.sh $(FUZZ_SECONDS)

bench: build ## Compare with QEMU and print the ratios
	$(CARGO) build --locked --package tests --bins
	target/debug/bench

bench-migrate: build ## Compare live migration with QEMU's; docs/benchmarks.md gets the table
	$(CARGO) build --locked --package tests --bins
	target/debug/bench migrate --docs docs/benchmarks.md

bench-gpu-migrate: build ## Move VMs with model GPUs, beside plain sockets; docs/benchmarks.md gets the table
	$(CARGO) build --release --locked --package tests --bins
	target/release/bench gpu-migrate --docs docs/benchmarks.md

lint: ## Formatting and clippy, warnings are errors; systemd units
	$(CARGO) fmt --all --check
	$(CARGO) fmt --all --check --manifest-path fuzz/Cargo.toml
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) check --manifest-path fuzz/Cargo.toml --locked
	@packaging/check-units.sh

deny: ## Who may depend on whom; licences, sources, versions
	$(CARGO) test --locked --package tests --test architecture
	@if command -v cargo-deny >/dev/null; then cargo deny --offline check bans licenses sources; fi

doc: ## API documentation, and the committed OpenAPI document against the types
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked --exclude drover-guest --exclude tests
	@packaging/check-openapi.sh

openapi: build ## Write docs/openapi.json anew from the types
	target/release/drover openapi > docs/openapi.json

ci: ## What CI runs: all tests, and no skip of what this machine can do
	DROVER_REQUIRE=$$(packaging/ci-require.sh) $(MAKE) test

install: build ## Install binary, completions, man pages, systemd units below PREFIX (/usr/local)
	packaging/install.sh target/release/drover $(DESTDIR)$(PREFIX) $(PREFIX)
