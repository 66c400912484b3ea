package helm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	_ "istio.io/api/security/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// Kinds that Istio has no more, or that are of no use without sidecars, are none of ours; there
// are none at the moment.
var left []string

// Names, versions, short names and columns of the definitions are Istio's, and every field that
// is typed has Istio's type: what `kubectl` shows and what manifests say does not depend on whose
// definitions are installed.
func TestDefinitionsAreIstios(t *testing.T) {
	ours := definitions(t, filepath.Join(Charts, "base/files/crds.gen.yaml"))
	directory, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "istio.io/api").Output()
	if err != nil {
		t.Fatalf("where is istio.io/api: %v", err)
	}
	theirs := definitions(t, filepath.Join(strings.TrimSpace(string(directory)), "kubernetes/customresourcedefinitions.gen.yaml"))
	for name, their := range theirs {
		our, found := ours[name]
		if !found {
			if !slices.Contains(left, name) {
				t.Errorf("%s is missing", name)
			}
			continue
		}
		delete(ours, name)
		t.Run(name, func(t *testing.T) { compareDefinition(t, our, their) })
	}
	for name := range ours {
		t.Errorf("Istio has no %s", name)
	}
}

func definitions(t *testing.T, path string) map[string]Object {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]Object{}
	for _, part := range strings.Split(string(text), "\n---\n") {
		var object Object
		if err := yaml.Unmarshal([]byte(part), &object); err != nil {
			t.Fatal(err)
		}
		if object["kind"] == "CustomResourceDefinition" {
			found[object["metadata"].(map[string]any)["name"].(string)] = object
		}
	}
	return found
}

func compareDefinition(t *testing.T, our, their Object) {
	ourSpec, theirSpec := our["spec"].(map[string]any), their["spec"].(map[string]any)
	for _, field := range []string{"group", "names", "scope"} {
		if !reflect.DeepEqual(ourSpec[field], theirSpec[field]) {
			t.Errorf("%s: ours %v, Istio's %v", field, ourSpec[field], theirSpec[field])
		}
	}
	theirVersions := map[string]map[string]any{}
	for _, version := range theirSpec["versions"].([]any) {
		version := version.(map[string]any)
		theirVersions[version["name"].(string)] = version
	}
	for _, version := range ourSpec["versions"].([]any) {
		our := version.(map[string]any)
		name := our["name"].(string)
		their, found := theirVersions[name]
		if !found {
			t.Errorf("Istio has no version %s", name)
			continue
		}
		delete(theirVersions, name)
		for _, field := range []string{"served", "storage", "subresources"} {
			if !reflect.DeepEqual(our[field], their[field]) {
				t.Errorf("%s.%s: ours %v, Istio's %v", name, field, our[field], their[field])
			}
		}
		if ours, theirs := columns(our), columns(their); !reflect.DeepEqual(ours, theirs) {
			t.Errorf("%s: columns: ours %v, Istio's %v", name, ours, theirs)
		}
		schema := func(version map[string]any) map[string]any {
			schema := version["schema"].(map[string]any)["openAPIV3Schema"].(map[string]any)
			return schema["properties"].(map[string]any)["spec"].(map[string]any)
		}
		for _, problem := range typesDiffer(schema(our), schema(their), "spec") {
			t.Errorf("%s: %s", name, problem)
		}
	}
	for name := range theirVersions {
		t.Errorf("version %s is missing", name)
	}
}

func columns(version map[string]any) []string {
	var found []string
	list, _ := version["additionalPrinterColumns"].([]any)
	for _, column := range list {
		column := column.(map[string]any)
		found = append(found, fmt.Sprint(column["name"], " ", column["jsonPath"], " ", column["type"]))
	}
	return found
}

// Every typed field of ours is a field of theirs with the same type, and every value that theirs
// takes of an enumeration is one that ours takes.
func typesDiffer(our, their map[string]any, path string) []string {
	var problems []string
	if our["type"] != nil && our["type"] != their["type"] {
		problems = append(problems, fmt.Sprintf("%s: ours %v, Istio's %v", path, our["type"], their["type"]))
	}
	if values, ok := our["enum"].([]any); ok {
		others, _ := their["enum"].([]any)
		for _, value := range others {
			if !slices.Contains(values, value) {
				problems = append(problems, fmt.Sprintf("%s: Istio takes %v", path, value))
			}
		}
	}
	for _, inner := range []string{"items", "additionalProperties"} {
		our, isOurs := our[inner].(map[string]any)
		their, isTheirs := their[inner].(map[string]any)
		if isOurs && isTheirs {
			problems = append(problems, typesDiffer(our, their, path+"[]")...)
		}
	}
	ours, _ := our["properties"].(map[string]any)
	theirs, _ := their["properties"].(map[string]any)
	for name, field := range ours {
		other, found := theirs[name].(map[string]any)
		if !found {
			problems = append(problems, path+"."+name+": Istio has no such field")
			continue
		}
		problems = append(problems, typesDiffer(field.(map[string]any), other, path+"."+name)...)
	}
	return problems
}
