//go:build tools

// Package echo pins the echo application of the suite's mesh tests.
package echo

import (
	_ "istio.io/istio/pkg/test/echo/cmd/client"
	_ "istio.io/istio/pkg/test/echo/cmd/server"
)
