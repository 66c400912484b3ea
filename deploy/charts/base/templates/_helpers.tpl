{{/*
What holds: the defaults, over them what the user gave.
*/}}
{{- define "base.values" -}}
{{- $given := omit .Values "_internal_defaults_do_not_set" -}}
{{- toYaml (mustMergeOverwrite (deepCopy .Values._internal_defaults_do_not_set) (deepCopy $given)) -}}
{{- end -}}
