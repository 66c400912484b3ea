package helm

import (
	"os/exec"
	"reflect"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/yaml"
)

// What each of adit's components is as a chart and a release.
var components = []struct{ component, chart, release string }{
	{"base", "base", "istio-base"},
	{"pilot", "istiod", "istiod"},
	{"cni", "cni", "istio-cni"},
	{"ztunnel", "ztunnel", "ztunnel"},
}

// The matrix: values as an IstioOperator has them. Each case is rendered by Helm per chart, with
// `values.<component>` at the top, and by `adit manifest generate` as a whole.
var matrix = map[string]string{
	"defaults": `{}`,
	"demo":     `profile: demo`,
	"minimal":  `profile: minimal`,
	"openshift": `
values: {platform: openshift}`,
	"gke": `
values: {global: {platform: gke}}`,
	"k3s and a profile": `
profile: demo
values: {global: {platform: k3s}, cni: {cniBinDir: /opt/own/bin}}`,
	"microk8s": `
values: {platform: microk8s}`,
	"images": `
hub: registry.example/adit
tag: "1.10"
values:
  global: {imagePullPolicy: Always, imagePullSecrets: [one, two]}
  pilot: {image: registry.example/other/aditd@sha256:00, imagePullPolicy: Never}
  cni: {hub: other.example, tag: v2}
  ztunnel: {image: ztunnel-debug}`,
	"logging": `
values:
  global: {logging: {level: "default:info,xds:debug"}, logAsJson: true}
  ztunnel: {logLevel: warn}
  cni: {logging: {level: "trace"}}`,
	"revision": `
revision: canary
values: {pilot: {podMonitor: {enabled: true, labels: {release: prometheus}}}}`,
	"mesh config": `
meshConfig:
  trustDomain: example.org
  trustDomainAliases: [old.example.org, older.example.org]
  rootNamespace: mesh-root
  accessLogFile: /dev/stdout
  defaultConfig: {tracing: {sampling: 12.5}}
  extensionProviders:
    - name: otel
      opentelemetry: {service: otel.observability.svc.cluster.local, port: 4317}`,
	"scheduling": `
values:
  global:
    priorityClassName: system-cluster-critical
    defaultNodeSelector: {disk: fast}
    defaultTolerations: [{key: a, operator: Exists}]
  pilot:
    affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: a, operator: In, values: [b]}]}]}}}
    tolerations: [{key: control-plane, operator: Exists, effect: NoSchedule}]
    nodeSelector: {role: control}
    topologySpreadConstraints: [{maxSkew: 1, topologyKey: topology.kubernetes.io/zone, whenUnsatisfiable: ScheduleAnyway}]
  ztunnel: {tolerations: [{key: x, operator: Equal, value: "true"}], affinity: {podAffinity: {}}}
  cni: {nodeSelector: {mesh: "yes"}}`,
	"scaling": `
values:
  pilot:
    autoscaleEnabled: false
    replicaCount: 3
    rollingMaxSurge: 1
    rollingMaxUnavailable: 0
  global: {defaultPodDisruptionBudget: {enabled: false}}`,
	"autoscaling": `
values:
  pilot:
    autoscaleMin: 2
    autoscaleMax: 10
    cpu: {targetAverageUtilization: 60}
    memory: {targetAverageUtilization: 70}
    autoscaleBehavior: {scaleDown: {stabilizationWindowSeconds: 300}}`,
	"environment": `
values:
  pilot:
    env: {A: b, NUMBER: "5", QUOTED: "say \"x\""}
    envVarFrom: [{name: FROM, valueFrom: {secretKeyRef: {name: s, key: k}}}]
    extraContainerArgs: ["--one", "two"]
    volumes: [{name: extra, emptyDir: {}}]
    volumeMounts: [{name: extra, mountPath: /extra}]
    initContainers: [{name: first, image: busybox}]
  ztunnel: {env: {X: "1"}, volumes: [{name: extra, emptyDir: {}}], volumeMounts: [{name: extra, mountPath: /extra}]}
  cni: {env: {Z: z, "ON": "off"}, cniConfFileName: 10-calico.conflist, excludeNamespaces: [kube-system, other]}`,
	"resources": `
values:
  pilot: {resources: {requests: {cpu: 2, memory: 4Gi}, limits: {memory: 8Gi}}}
  cni: {resources: null}
  ztunnel: {resources: {limits: {cpu: 1500m}}, terminationGracePeriodSeconds: 90}`,
	"labels and annotations": `
values:
  pilot:
    deploymentLabels: {team: mesh}
    deploymentAnnotations: {a: b}
    podLabels: {pod: label}
    podAnnotations: {prometheus.io/scrape: "false"}
    serviceAnnotations: {cloud: "true"}
    serviceAccountAnnotations: {iam: role}
    ipFamilyPolicy: PreferDualStack
    ipFamilies: [IPv6, IPv4]
  cni: {daemonSetLabels: {x: z}, podLabels: {l: m}, podAnnotations: {m: o}, serviceAccountAnnotations: {p: q}}
  ztunnel: {labels: {a: b}, annotations: {c: d}, podLabels: {e: f}, podAnnotations: {g: h}}`,
	"security": `
values:
  pilot: {seccompProfile: {type: Localhost, localhostProfile: p.json}}
  cni: {seccompProfile: {type: RuntimeDefault}, seLinuxOptions: {type: spc_t}}
  ztunnel: {seccompProfile: {type: RuntimeDefault}, seLinuxOptions: {type: spc_t}}`,
	"several clusters": `
values:
  global:
    network: net-1
    meshID: mesh
    multiCluster: {enabled: true, clusterName: one}
    proxy: {clusterDomain: example.local}
    remotePilotAddress: https://istiod.example:15012
    caAddress: https://ca.example:15012
  pilot: {trustedZtunnelNamespace: kube-system, trustedZtunnelName: tunnel}
  ztunnel: {network: net-2}`,
	"network policies": `
values: {global: {networkPolicy: {enabled: true}, configValidation: false}}`,
	"monitoring": `
values:
  pilot: {podMonitor: {enabled: true, interval: 30s}}
  cni: {podMonitor: {enabled: true}}
  ztunnel: {podMonitor: {enabled: true, labels: {a: b}}, resourceQuotas: {enabled: true, pods: 10}}`,
	"without parts": `
components: {cni: {enabled: false}}
values:
  base: {enableCRDTemplates: false}
  pilot: {validation: {enabled: false}, configMap: false}`,
	"definitions": `
values:
  base: {excludedCRDs: [wasmplugins.extensions.istio.io, gateways.networking.istio.io]}
  pilot: {validation: {failurePolicy: Ignore, timeoutSeconds: 10}}`,
	"waypoints": `
values:
  global:
    waypoint:
      resources: {requests: {cpu: 1}, limits: {memory: 1Gi}}
      nodeSelector: {a: b}
      tolerations: [{operator: Exists}]`,
	"another namespace": `
namespace: mesh-system
components: {cni: {namespace: kube-system}}`,
}

type operator struct {
	Profile    string         `json:"profile"`
	Hub        any            `json:"hub"`
	Tag        any            `json:"tag"`
	Namespace  string         `json:"namespace"`
	Revision   string         `json:"revision"`
	MeshConfig map[string]any `json:"meshConfig"`
	Components map[string]struct {
		Enabled   *bool  `json:"enabled"`
		Namespace string `json:"namespace"`
	} `json:"components"`
	Values map[string]any `json:"values"`
}

// The values of one chart, as somebody would give them to Helm.
func (o operator) forChart(component string) map[string]any {
	values := map[string]any{}
	if own, ok := o.Values[component].(map[string]any); ok {
		for key, value := range own {
			values[key] = value
		}
	}
	if component == "base" && len(values) > 0 {
		values = map[string]any{"base": values}
	}
	global := map[string]any{"istioNamespace": o.namespace()}
	if own, ok := o.Values["global"].(map[string]any); ok {
		for key, value := range own {
			global[key] = value
		}
	}
	for key, value := range map[string]any{"hub": o.Hub, "tag": o.Tag} {
		if value != nil {
			global[key] = value
		}
	}
	values["global"] = global
	values["profile"] = o.Profile
	if o.Profile == "" {
		values["profile"] = "ambient"
	}
	if o.Revision != "" {
		values["revision"] = o.Revision
	}
	if platform, ok := o.Values["platform"]; ok {
		values["platform"] = platform
	}
	if o.MeshConfig != nil && (component == "pilot" || component == "ztunnel") {
		values["meshConfig"] = o.MeshConfig
	}
	return values
}

func (o operator) namespace() string {
	if o.Namespace == "" {
		return "istio-system"
	}
	return o.Namespace
}

func TestAditRendersWhatHelmRenders(t *testing.T) {
	adit, err := Adit()
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range matrix {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var spec operator
			if err := yaml.Unmarshal([]byte(text), &spec); err != nil {
				t.Fatal(err)
			}
			var want []Object
			for _, part := range components {
				settings := spec.Components[part.component]
				if settings.Enabled != nil && !*settings.Enabled {
					continue
				}
				if spec.Profile == "minimal" && (part.component == "cni" || part.component == "ztunnel") {
					continue
				}
				namespace := spec.namespace()
				if settings.Namespace != "" {
					namespace = settings.Namespace
				}
				loaded, err := Load(part.chart)
				if err != nil {
					t.Fatal(err)
				}
				objects, err := Render(loaded, part.release, namespace, spec.forChart(part.component))
				if err != nil {
					t.Fatalf("Helm: %v", err)
				}
				want = append(want, objects...)
			}
			got := generate(t, adit, text)
			compare(t, want, got)
		})
	}
}

func generate(t *testing.T, adit, spec string) []Object {
	t.Helper()
	indented := "  " + strings.ReplaceAll(strings.TrimSpace(spec), "\n", "\n  ")
	document := "apiVersion: install.istio.io/v1alpha1\nkind: IstioOperator\nspec:\n" + indented + "\n"
	command := exec.Command(adit, "manifest", "generate", "-f", "/dev/stdin")
	command.Stdin = strings.NewReader(document)
	var complaint strings.Builder
	command.Stderr = &complaint
	output, err := command.Output()
	if err != nil {
		t.Fatalf("adit manifest generate: %v: %s", err, complaint.String())
	}
	objects, err := Parse(output)
	if err != nil {
		t.Fatalf("the output of adit: %v", err)
	}
	return objects
}

func compare(t *testing.T, want, got []Object) {
	t.Helper()
	Sort(want)
	Sort(got)
	byKey := map[string]Object{}
	for _, object := range got {
		if _, twice := byKey[Key(object)]; twice {
			t.Errorf("adit renders %s twice", Key(object))
		}
		byKey[Key(object)] = object
	}
	for _, object := range want {
		mine, found := byKey[Key(object)]
		if !found {
			t.Errorf("adit does not render %s", Key(object))
			continue
		}
		delete(byKey, Key(object))
		if path := difference(object, mine, ""); path != "" {
			t.Errorf("%s: %s", Key(object), path)
		}
	}
	for key := range byKey {
		t.Errorf("Helm does not render %s", key)
	}
}

// The first difference, by path.
func difference(want, got any, path string) string {
	wantMap, isMap := want.(map[string]any)
	gotMap, both := got.(map[string]any)
	if isMap && both {
		for key := range gotMap {
			if _, found := wantMap[key]; !found {
				return path + "." + key + ": Helm has none"
			}
		}
		for key, value := range wantMap {
			other, found := gotMap[key]
			if !found {
				return path + "." + key + ": adit has none"
			}
			if found := difference(value, other, path+"."+key); found != "" {
				return found
			}
		}
		return ""
	}
	wantList, isList := want.([]any)
	gotList, both := got.([]any)
	if isList && both && len(wantList) == len(gotList) {
		for i := range wantList {
			if found := difference(wantList[i], gotList[i], path+"[]"); found != "" {
				return found
			}
		}
		return ""
	}
	// A document inside of a text: its quotes and the order of its fields mean nothing.
	wantText, isText := want.(string)
	gotText, both := got.(string)
	if isText && both && wantText != gotText && strings.Contains(wantText, "\n") {
		var wantInner, gotInner map[string]any
		if yaml.Unmarshal([]byte(wantText), &wantInner) == nil && yaml.Unmarshal([]byte(gotText), &gotInner) == nil {
			return difference(wantInner, gotInner, path)
		}
	}
	if !reflect.DeepEqual(want, got) {
		return strings.TrimSpace(path + ": Helm " + show(want) + ", adit " + show(got))
	}
	return ""
}

func show(value any) string {
	if value == nil {
		return "nothing"
	}
	text, err := yaml.ToJSON([]byte(strings.TrimSpace(toText(value))))
	if err != nil {
		return toText(value)
	}
	return string(text)
}
