package helm

import (
	"fmt"
	"strings"
	"testing"
)

func toText(value any) string { return fmt.Sprintf("%#v", value) }

// The umbrella chart is the four charts, with the same release name and shared globals.
func TestTheUmbrellaIsItsParts(t *testing.T) {
	values := func() map[string]any {
		return map[string]any{
			"global":  map[string]any{"hub": "registry.example/adit", "logging": map[string]any{"level": "debug"}},
			"istiod":  map[string]any{"autoscaleEnabled": false, "replicaCount": 2},
			"ztunnel": map[string]any{"podAnnotations": map[string]any{"a": "b"}},
		}
	}
	umbrella, err := Load("ambient")
	if err != nil {
		t.Fatal(err)
	}
	whole, err := Render(umbrella, "mesh", "istio-system", values())
	if err != nil {
		t.Fatal(err)
	}
	var parts []Object
	for _, name := range []string{"base", "istiod", "cni", "ztunnel"} {
		loaded, err := Load(name)
		if err != nil {
			t.Fatal(err)
		}
		own, _ := values()[name].(map[string]any)
		if own == nil {
			own = map[string]any{}
		}
		own["global"] = values()["global"]
		objects, err := Render(loaded, "mesh", "istio-system", own)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, objects...)
	}
	compare(t, parts, whole)
}

func TestAPartOfTheUmbrellaCanBeLeftOut(t *testing.T) {
	umbrella, err := Load("ambient")
	if err != nil {
		t.Fatal(err)
	}
	objects, err := Render(umbrella, "mesh", "istio-system", map[string]any{"cni": map[string]any{"enabled": false}})
	if err != nil {
		t.Fatal(err)
	}
	for _, object := range objects {
		if strings.Contains(Key(object), "istio-cni") {
			t.Errorf("%s is rendered", Key(object))
		}
	}
}

// Helm refuses with values.schema.json what adit refuses.
func TestHelmRefusesUnknownValues(t *testing.T) {
	for chart, values := range map[string]map[string]any{
		"istiod":  {"replicaCuont": 2},
		"cni":     {"global": map[string]any{"hbu": "x"}},
		"ztunnel": {"resources": 5},
		"gateway": {"autoscaling": map[string]any{"enabled": "maybe"}},
		"base":    {"profile": "large"},
	} {
		loaded, err := Load(chart)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Render(loaded, "x", "istio-system", values); err == nil {
			t.Errorf("chart %s takes %v", chart, values)
		}
	}
}

// A chart for GitOps renders to the same, whenever and however often.
func TestRenderingIsDeterministic(t *testing.T) {
	for _, name := range []string{"base", "istiod", "cni", "ztunnel", "gateway", "ambient"} {
		var before []Object
		for range 2 {
			loaded, err := Load(name)
			if err != nil {
				t.Fatal(err)
			}
			objects, err := Render(loaded, "x", "istio-system", map[string]any{})
			if err != nil {
				t.Fatal(err)
			}
			if before != nil {
				compare(t, before, objects)
			}
			before = objects
		}
	}
}

func TestAGatewayHasItsOverlay(t *testing.T) {
	loaded, err := Load("gateway")
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]any{
		"replicaCount":        3,
		"waypointFor":         "all",
		"resources":           map[string]any{"limits": map[string]any{"memory": "1Gi"}},
		"podDisruptionBudget": map[string]any{"maxUnavailable": 1},
		"service":             map[string]any{"annotations": map[string]any{"a": "b"}, "externalTrafficPolicy": "Local"},
		"autoscaling":         map[string]any{"enabled": true},
	}
	objects, err := Render(loaded, "waypoint", "shop", values)
	if err != nil {
		t.Fatal(err)
	}
	for _, object := range objects {
		if object["kind"] != "ConfigMap" {
			continue
		}
		for key, text := range object["data"].(map[string]any) {
			patches, err := Parse([]byte(text.(string)))
			if err != nil || len(patches) != 1 {
				t.Errorf("overlay %s is no object: %v", key, err)
			}
		}
		for _, key := range []string{"deployment", "service", "horizontalPodAutoscaler", "podDisruptionBudget"} {
			if object["data"].(map[string]any)[key] == nil {
				t.Errorf("there is no overlay for %s", key)
			}
		}
	}
}
