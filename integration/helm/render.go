// Package helm renders the charts of this tree with Helm itself.
//
// `adit` renders the same charts with an engine of its own. The tests of this package compare
// both, object by object, over a matrix of values, and hold the resource definitions to those
// of Istio.
package helm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// Object is a manifest.
type Object = map[string]any

// Charts is the folder with all charts.
const Charts = "../../deploy/charts"

// Load reads a chart and, for the umbrella, the charts that it depends on, which lie beside it.
func Load(name string) (*chart.Chart, error) {
	loaded, err := loader.LoadDir(filepath.Join(Charts, name))
	if err != nil {
		return nil, fmt.Errorf("chart %s: %w", name, err)
	}
	// Those that `helm dependency build` has put there may be old.
	loaded.SetDependencies()
	for _, dependency := range loaded.Metadata.Dependencies {
		child, err := Load(dependency.Name)
		if err != nil {
			return nil, err
		}
		loaded.AddDependency(child)
	}
	return loaded, nil
}

// Render does what `helm template RELEASE CHART --namespace NAMESPACE` does, with values that
// have been read already. The service is called adit, as `adit` calls itself, and not Helm.
func Render(loaded *chart.Chart, release, namespace string, values map[string]any) ([]Object, error) {
	if err := chartutil.ProcessDependenciesWithMerge(loaded, values); err != nil {
		return nil, err
	}
	options := chartutil.ReleaseOptions{Name: release, Namespace: namespace, IsInstall: true}
	context, err := chartutil.ToRenderValues(loaded, values, options, chartutil.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	context["Release"].(map[string]any)["Service"] = "adit"
	files, err := engine.Render(loaded, context)
	if err != nil {
		return nil, err
	}
	var objects []Object
	for path, text := range files {
		if strings.HasSuffix(path, "NOTES.txt") || strings.HasPrefix(filepath.Base(path), "_") {
			continue
		}
		parsed, err := Parse([]byte(text))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		objects = append(objects, parsed...)
	}
	Sort(objects)
	return objects, nil
}

// Parse reads a stream of manifests.
func Parse(text []byte) ([]Object, error) {
	var objects []Object
	decoder := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096)
	for {
		var object Object
		if err := decoder.Decode(&object); errors.Is(err, io.EOF) {
			return objects, nil
		} else if err != nil {
			return nil, err
		}
		if len(object) > 0 {
			objects = append(objects, object)
		}
	}
}

// Key names an object.
func Key(object Object) string {
	metadata, _ := object["metadata"].(map[string]any)
	return fmt.Sprintf("%v %v %v/%v", object["apiVersion"], object["kind"], metadata["namespace"], metadata["name"])
}

// Sort brings objects into one order.
func Sort(objects []Object) {
	sort.Slice(objects, func(i, j int) bool { return Key(objects[i]) < Key(objects[j]) })
}

// Adit is the program under test: ADIT, or what cargo has built.
func Adit() (string, error) {
	if path := os.Getenv("ADIT"); path != "" {
		return path, nil
	}
	target := os.Getenv("CARGO_TARGET_DIR")
	if target == "" {
		target = "../../target"
	}
	for _, profile := range []string{"debug", "release"} {
		path := filepath.Join(target, profile, "adit")
		if _, err := os.Stat(path); err == nil {
			return filepath.Abs(path)
		}
	}
	return "", errors.New("adit is not built: cargo build -p adit-cli, or set ADIT to its path")
}
