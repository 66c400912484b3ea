{{/*
What holds: the defaults, over them what the user gave.
*/}}
{{- define "gateway.values" -}}
{{- $given := omit .Values "_internal_defaults_do_not_set" -}}
{{- toYaml (mustMergeOverwrite (deepCopy .Values._internal_defaults_do_not_set) (deepCopy $given)) -}}
{{- end -}}

{{/*
Labels of every object; takes the merged values and the release.
*/}}
{{- define "gateway.labels" -}}
app.kubernetes.io/name: {{ .values.name | default .root.Release.Name | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/part-of: istio
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | quote }}
{{- end -}}

{{/*
What the Deployment, Service, ... that are made of the Gateway are to have: one strategic
merge patch each, as infrastructure.parametersRef takes them.
*/}}
{{- define "gateway.deployment" -}}
{{- if not .autoscaling.enabled }}
spec:
  replicas: {{ int .replicaCount }}
  template:
{{- else }}
spec:
  template:
{{- end }}
    {{- if or .podLabels .podAnnotations }}
    metadata:
      {{- with .podLabels }}
      labels:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    {{- end }}
    spec:
      terminationGracePeriodSeconds: {{ int .terminationGracePeriodSeconds }}
      {{- if or .resources .env }}
      containers:
        - name: istio-proxy
          {{- with .resources }}
          resources:
            {{- toYaml . | nindent 12 }}
          {{- end }}
          {{- with .env }}
          env:
            {{- range $key, $value := . }}
            - name: {{ $key | quote }}
              value: {{ $value | quote }}
            {{- end }}
          {{- end }}
      {{- end }}
      {{- with .affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .topologySpreadConstraints }}
      topologySpreadConstraints:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .priorityClassName }}
      priorityClassName: {{ . | quote }}
      {{- end }}
      {{- with .imagePullSecrets }}
      imagePullSecrets:
        {{- range . }}
        - name: {{ . }}
        {{- end }}
      {{- end }}
{{- end -}}
