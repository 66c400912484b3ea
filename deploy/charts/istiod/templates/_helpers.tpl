{{/*
What holds: the defaults, over them the profile and the platform, over them what the user gave.
*/}}
{{- define "istiod.values" -}}
{{- $given := omit .Values "_internal_defaults_do_not_set" -}}
{{- $global := $given.global | default dict -}}
{{- $merged := deepCopy .Values._internal_defaults_do_not_set -}}
{{- $names := list -}}
{{- with coalesce $given.profile $global.profile -}}
{{- $names = append $names (printf "files/profile-%s.yaml" .) -}}
{{- end -}}
{{- with coalesce $given.platform $global.platform -}}
{{- $names = append $names (printf "files/profile-platform-%s.yaml" .) -}}
{{- end -}}
{{- range $name := $names -}}
{{- $file := $.Files.Get $name -}}
{{- if not $file -}}
{{- fail (printf "values: no such profile or platform: %s" ($name | trimPrefix "files/profile-" | trimPrefix "platform-" | trimSuffix ".yaml")) -}}
{{- end -}}
{{- $merged = mustMergeOverwrite $merged (fromYaml $file) -}}
{{- end -}}
{{- toYaml (mustMergeOverwrite $merged (deepCopy $given)) -}}
{{- end -}}

{{/*
Labels of every object; takes the merged values and the release.
*/}}
{{- define "istiod.labels" -}}
app.kubernetes.io/name: istiod
app.kubernetes.io/managed-by: {{ .root.Release.Service | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/part-of: istio
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | quote }}
istio.io/rev: {{ .values.revision | default "default" | quote }}
operator.istio.io/component: Pilot
release: {{ .root.Release.Name | quote }}
{{- end -}}

{{/*
The image: a name is completed with hub and tag, a whole reference is taken as it is.
*/}}
{{- define "istiod.image" -}}
{{- if contains "/" .values.image -}}
{{- .values.image -}}
{{- else -}}
{{- $hub := .values.hub | default .values.global.hub -}}
{{- $tag := .values.tag | default .values.global.tag | default .root.Chart.AppVersion -}}
{{- printf "%s/%s:%s" $hub .values.image (toString $tag) -}}
{{- end -}}
{{- end -}}

{{/*
Istio's scopes (default:info,xds:debug) as the log filter of Adit's programs (info,xds=debug).
*/}}
{{- define "istiod.logFilter" -}}
{{- . | replace "default:" "" | replace ":" "=" -}}
{{- end -}}
