{{/* Names leave room for the longest suffix (-controller) in a label's 63 characters. */}}
{{- define "gateway.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- /* Releases may have dots in their names, Services may not. */ -}}
{{- $release := .Release.Name | replace "." "-" -}}
{{- ternary $release (printf "%s-%s" $release $name) (contains $name $release) | trunc 48 | trimAll "-" -}}
{{- end -}}
{{- end -}}

{{/* Of a (dict "root" $ "component" NAME): what never changes, whatever else is called otherwise, and selects. */}}
{{- define "gateway.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "gateway.labels" -}}
{{ include "gateway.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The metadata of such pods. "atStart": a hash of what they read once, so that they are rolled where it changes. */}}
{{- define "gateway.podMetadata" -}}
labels: {{- merge (dict) .root.Values.podLabels (include "gateway.labels" . | fromYaml) | toYaml | nindent 2 }}
annotations: {{- merge (dict "gateway-extproc/at-start" .atStart) .root.Values.podAnnotations | toYaml | nindent 2 }}
{{- end -}}

{{/* Of a (dict "of" IMAGE "tag" DEFAULT). */}}
{{- define "gateway.image" -}}
{{- if .of.digest -}}
{{ .of.repository }}@{{ .of.digest }}
{{- else -}}
{{ .of.repository }}:{{ default .tag .of.tag }}
{{- end -}}
{{- end -}}

{{- define "gateway.account" -}}
{{- default (ternary (include "gateway.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end -}}
{{- define "gateway.controllerAccount" -}}
{{- if eq .Values.controller.mode "serve" -}}
{{ include "gateway.account" . }}
{{- else -}}
{{- $own := printf "%s-controller" (include "gateway.fullname" .) -}}
{{- default (ternary $own "default" .Values.controller.serviceAccount.create) .Values.controller.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "gateway.secret" -}}
{{- default (include "gateway.fullname" .) .Values.existingSecret -}}
{{- end -}}

{{/* The Gateway's name and namespace. */}}
{{- define "gateway.gatewayName" -}}
{{- default (include "gateway.fullname" .) .Values.gateway.name -}}
{{- end -}}
{{- define "gateway.gatewayNamespace" -}}
{{- if .Values.gateway.create -}}
{{ .Release.Namespace }}
{{- else -}}
{{ default .Release.Namespace .Values.gateway.namespace }}
{{- end -}}
{{- end -}}

{{/* Whether the chart's own Valkey counts: "true", or empty. */}}
{{- define "gateway.ownStore" -}}
{{- if and .Values.valkey.enabled (not .Values.store.url) (not .Values.store.existingSecret) -}}true{{- end -}}
{{- end -}}

{{/* The Secret with the URL of a store that there is, and the key there. Empty: none is named. */}}
{{- define "gateway.storeSecret" -}}
{{- if .Values.store.existingSecret -}}
{{ .Values.store.existingSecret }}
{{- else if .Values.store.url -}}
{{ include "gateway.fullname" . }}-store
{{- end -}}
{{- end -}}
{{- define "gateway.storeKey" -}}
{{- ternary .Values.store.key "url" (ne .Values.store.existingSecret "") -}}
{{- end -}}

{{/* Whether gateways find pods by Kubernetes, and whether they have to do with its API at all: "true", or empty. */}}
{{- define "gateway.discovers" -}}
{{- $kubernetes := (default dict .Values.config.discovery).kubernetes -}}
{{- if or (not (kindIs "bool" $kubernetes)) $kubernetes -}}true{{- end -}}
{{- end -}}
{{- define "gateway.asks" -}}
{{- if or (include "gateway.discovers" .) (eq .Values.controller.mode "serve") -}}true{{- end -}}
{{- end -}}

{{/* How many gateways there are at least. */}}
{{- define "gateway.fewest" -}}
{{- ternary .Values.autoscaling.minReplicas .Values.replicas .Values.autoscaling.enabled | int -}}
{{- end -}}

{{/* A number with a unit: (dict "of" VALUE "units" (dict UNIT FACTOR …)), to nine decimals. */}}
{{- define "gateway.number" -}}
{{- $text := toString .of -}}
{{- $unit := regexFind "[A-Za-z]+$" $text -}}
{{- mulf (trimSuffix $unit $text | float64) (get .units $unit) | printf "%.9f" -}}
{{- end -}}

{{/* A duration of the configuration (250ms, 1.5s, 5m, 12h, or 0) in milliseconds. */}}
{{- define "gateway.duration" -}}
{{- include "gateway.number" (dict "of" . "units" (dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000 "" 1)) -}}
{{- end -}}
{{- define "gateway.milliseconds" -}}
{{- include "gateway.duration" . | float64 | ceil | int64 -}}
{{- end -}}

{{/* A size of the configuration (bytes, or 64KiB, 32MiB, 1GiB) in bytes. */}}
{{- define "gateway.size" -}}
{{- include "gateway.number" (dict "of" . "units" (dict "KiB" 1024 "MiB" 1048576 "GiB" 1073741824 "" 1)) -}}
{{- end -}}
{{- define "gateway.bytes" -}}
{{- include "gateway.size" . | float64 | int64 -}}
{{- end -}}

{{/* A quantity of Kubernetes (500m, 1Gi, 1e9, 2). */}}
{{- define "gateway.quantity" -}}
{{- $decimal := dict "n" 0.000000001 "u" 0.000001 "m" 0.001 "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 -}}
{{- $binary := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976 -}}
{{- include "gateway.number" (dict "of" . "units" (merge $decimal $binary)) -}}
{{- end -}}

{{- define "gateway.maxBodyBytes" -}}
{{- $limits := default dict .Values.config.limits -}}
{{- include "gateway.bytes" (default "32MiB" $limits.max_body_bytes) -}}
{{- end -}}
{{- define "gateway.bodiesInMemory" -}}
{{- $limits := default dict .Values.config.limits -}}
{{- include "gateway.bytes" (default "128MiB" $limits.bodies_in_memory) -}}
{{- end -}}

{{/* How long the gateway may take for the store, and the longest turn at a pod (queue_wait), in milliseconds. */}}
{{- define "gateway.storeTimeout" -}}
{{- include "gateway.milliseconds" (default "250ms" (default dict .Values.config.store).timeout) -}}
{{- end -}}
{{- define "gateway.longestWait" -}}
{{- $longest := 0 -}}
{{- range $name, $model := default dict .Values.config.models -}}
{{- if and $model (hasKey $model "saturation") -}}
{{- $longest = max $longest (include "gateway.milliseconds" (default "10s" $model.queue_wait) | int64) -}}
{{- end -}}
{{- end -}}
{{- $longest -}}
{{- end -}}

{{/*
How long Envoy waits for the gateway's word, in milliseconds: for the store, for room for the body (10 s) or for a turn
at a pod, as gateway_extproc/bootstrap.py has it, and two seconds: more than the one that the gateway's configuration
must leave.
*/}}
{{- define "gateway.messageTimeout" -}}
{{- if .Values.gateway.messageTimeoutSeconds -}}
{{- mul 1000 (int64 .Values.gateway.messageTimeoutSeconds) -}}
{{- else -}}
{{- $room := 10000 -}}
{{- add (include "gateway.storeTimeout" . | int64) (max $room (include "gateway.longestWait" . | int64)) 2000 -}}
{{- end -}}
{{- end -}}

{{/* The gateway's whole configuration, as YAML. */}}
{{- define "gateway.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $admin := default dict $config.admin -}}
{{- $listen := default dict $config.listen -}}
{{- $store := default dict $config.store -}}
{{- $discovery := default dict $config.discovery -}}
{{- $usage := default dict $config.usage -}}
{{- $limits := default dict $config.limits -}}
{{- $_ := set $listen "grpc" (printf "%s:9002" .Values.listenAddress) -}}
{{- $_ := set $listen "http" (printf "%s:9090" .Values.listenAddress) -}}
{{- if not (hasKey $listen "drain") -}}{{- $_ := set $listen "drain" "5m" -}}{{- end -}}
{{- $_ := set $admin "token_file" "/etc/gateway-secret/admin-token" -}}
{{- if include "gateway.storeSecret" . -}}
{{- $_ := set $store "url_file" "/etc/gateway-store/url" -}}
{{- end -}}
{{- /* `false` stays: pods are then those of `config.pods`. */ -}}
{{- if include "gateway.discovers" . -}}
{{- $kubernetes := ternary dict (default dict $discovery.kubernetes) (kindIs "bool" $discovery.kubernetes) -}}
{{- with .Values.namespaces -}}{{- $_ := set $kubernetes "namespaces" . -}}{{- end -}}
{{- $_ := set $discovery "kubernetes" (ternary $kubernetes true (gt (len $kubernetes) 0)) -}}
{{- end -}}
{{- $_ := set $config "listen" $listen -}}
{{- $_ := set $config "admin" $admin -}}
{{- if $store -}}{{- $_ := set $config "store" $store -}}{{- end -}}
{{- $_ := set $config "discovery" $discovery -}}
{{- if ne .Values.controller.mode "none" -}}
{{- $controller := dict "gateway" (printf "%s/%s" (include "gateway.gatewayNamespace" .) (include "gateway.gatewayName" .)) -}}
{{- with .Values.namespaces -}}{{- $_ := set $controller "namespaces" . -}}{{- end -}}
{{- if eq .Values.controller.mode "serve" -}}{{- $_ := set $controller "serve" true -}}{{- end -}}
{{- $_ := set $config "controller" $controller -}}
{{- end -}}
{{- /* So that the gateway knows for how long Envoy waits. */ -}}
{{- $_ := set $config "envoy" (dict "message_timeout" (printf "%sms" (include "gateway.messageTimeout" .))) -}}
{{- if .Values.accessLog.enabled -}}
{{- $_ := set $usage "source" "access_log" -}}
{{- $_ := set $config "usage" $usage -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* listen.drain of it, in whole seconds. */}}
{{- define "gateway.drain" -}}
{{- $drain := (include "gateway.config" . | fromYaml).listen.drain -}}
{{- div (add (include "gateway.milliseconds" $drain | int64) 999) 1000 -}}
{{- end -}}

{{/* What of it the controller reads, without what would need a secret. */}}
{{- define "gateway.controllerConfig" -}}
{{- toYaml (pick (include "gateway.config" . | fromYaml) "controller" "models" "prices" "logging") -}}
{{- end -}}

{{/* What only a start takes up, of the gateway and of the controller: all else is read while they run. */}}
{{- define "gateway.atStart" -}}
{{- $config := include "gateway.config" . | fromYaml -}}
{{- $limits := pick (default dict $config.limits) "max_body_bytes" "bodies_in_memory" -}}
{{- $sections := pick $config "listen" "envoy" "store" "admin" "discovery" "controller" "logging" "usage" -}}
{{- toJson (merge (dict "limits" $limits "url" .Values.store.url) $sections) | sha256sum -}}
{{- end -}}
{{- define "gateway.controllerAtStart" -}}
{{- toJson (pick (include "gateway.config" . | fromYaml) "controller" "logging") | sha256sum -}}
{{- end -}}

{{/* Pod Security "restricted", and nothing written outside of volumes. */}}
{{- define "gateway.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end -}}
{{- define "gateway.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* What a pod of ours has of the values that hold for all. */}}
{{- define "gateway.placement" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end -}}
