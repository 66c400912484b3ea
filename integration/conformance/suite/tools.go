//go:build tools

package suite

// The echo server of the suite's Deployments: built from this module, so that go.mod
// says which.
import _ "sigs.k8s.io/gateway-api-conformance-images/echo-basic"
