# One line each; everything real is in cargo or in integration/scripts.
SHELL := /bin/bash
scripts := integration/scripts

.PHONY: demo test lint bench clean cluster cluster-down images e2e conformance
demo:   ; $(scripts)/install-deps build && cargo build -q --workspace --bins && cargo run -q -p adit-integration --bin demo
test:   ; $(scripts)/test
bench:  ; $(scripts)/install-deps build bench && cargo build -q --release --workspace --bins && cargo run -q --release -p adit-integration --bin bench
lint:   ; $(scripts)/install-deps build && cargo fmt --all --check && cargo clippy -q --workspace --all-targets -- -D warnings
# A Kubernetes cluster of this machine's namespaces, and what runs on it (or on KUBECONFIG, or CLUSTER=kind).
cluster:      ; @$(scripts)/install-deps build cluster && integration/cluster/up
cluster-down: ; @integration/cluster/down
images:       ; @$(scripts)/install-deps build && deploy/images/build
e2e:          ; @$(scripts)/e2e $(TESTS)
conformance:  ; @$(scripts)/e2e --exec integration/conformance/run
clean:  ; cargo clean
