# One line each; everything real is in cargo or in integration/scripts.
SHELL := /bin/bash
scripts := integration/scripts

.PHONY: demo test lint bench clean
demo:   ; $(scripts)/install-deps build && cargo build -q --workspace --bins && cargo run -q -p adit-integration --bin demo
test:   ; $(scripts)/test
bench:  ; $(scripts)/install-deps build bench && cargo build -q --release --workspace --bins && cargo run -q --release -p adit-integration --bin bench
lint:   ; $(scripts)/install-deps build && cargo fmt --all --check && cargo clippy -q --workspace --all-targets -- -D warnings
clean:  ; cargo clean
