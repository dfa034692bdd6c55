{{/* Names leave room for the longest suffix (-controller) in a label's 63 characters. */}}
{{- define "gateway.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 48 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 48 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 48 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "gateway.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* Of a (dict "root" $ "component" NAME): what never changes, and selects. */}}
{{- define "gateway.selector" -}}
app.kubernetes.io/name: {{ include "gateway.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "gateway.labels" -}}
{{ include "gateway.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
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

{{/* A duration of the configuration (250ms, 1.5s, 5m, 12h, or 0) in milliseconds. */}}
{{- define "gateway.milliseconds" -}}
{{- $text := toString . -}}
{{- $number := regexFind "^[0-9.]+" $text | float64 -}}
{{- $unit := regexFind "[a-z]+$" $text -}}
{{- $factor := get (dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000 "" 0) $unit -}}
{{- mulf $number $factor | ceil | int64 -}}
{{- end -}}

{{/* A size of the configuration (bytes, or 64KiB, 32MiB, 1GiB) in bytes. */}}
{{- define "gateway.bytes" -}}
{{- if kindIs "string" . -}}
{{- $factor := get (dict "KiB" 1024 "MiB" 1048576 "GiB" 1073741824) (regexFind "[KMG]iB$" .) -}}
{{- mulf (regexFind "^[0-9.]+" . | float64) $factor | int64 -}}
{{- else -}}
{{- int64 . -}}
{{- end -}}
{{- end -}}

{{- define "gateway.maxBodyBytes" -}}
{{- $limits := default dict .Values.config.limits -}}
{{- include "gateway.bytes" (default "32MiB" $limits.max_body_bytes) -}}
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
{{- if .Values.store.existingSecret -}}
{{- $_ := set $store "url_file" "/etc/gateway-store/url" -}}
{{- end -}}
{{- /* `false` stays: pods are then those of `config.pods`. */ -}}
{{- if or (not (kindIs "bool" $discovery.kubernetes)) $discovery.kubernetes -}}
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

{{/* What only a start of the gateway takes up: where it changes, pods are rolled; all else is read while they run. */}}
{{- define "gateway.atStart" -}}
{{- $config := include "gateway.config" . | fromYaml -}}
{{- $limits := pick (default dict $config.limits) "max_body_bytes" "bodies_in_memory" -}}
{{- $sections := pick $config "listen" "envoy" "store" "admin" "discovery" "controller" "logging" "usage" -}}
{{- toJson (merge (dict "limits" $limits) $sections) | sha256sum -}}
{{- end -}}

{{/* What the chart sets itself, and what cannot be. Nothing is rendered then. */}}
{{- define "gateway.check" -}}
{{- $config := .Values.config -}}
{{- $ours := dict "envoy" "what Envoy is told is in `gateway`" "controller" "set `controller.mode` and `namespaces`" -}}
{{- range $key, $instead := $ours -}}
{{- if hasKey $config $key -}}{{- fail (printf "config.%s is the chart's to set: %s" $key $instead) -}}{{- end -}}
{{- end -}}
{{- $within := list
  (list "listen" "grpc" "set `listenAddress`") (list "listen" "http" "set `listenAddress`")
  (list "store" "url" "set `store.url` or `store.existingSecret`")
  (list "store" "url_file" "set `store.existingSecret`")
  (list "admin" "token" "set `existingSecret`") (list "admin" "token_file" "set `existingSecret`") -}}
{{- range $within -}}
{{- if hasKey (default dict (get $config (index . 0))) (index . 1) -}}
{{- fail (printf "config.%s.%s is the chart's to set: %s" (index . 0) (index . 1) (index . 2)) -}}
{{- end -}}
{{- end -}}
{{- $found := (default dict $config.discovery).kubernetes -}}
{{- if kindIs "map" $found -}}
{{- range list "namespaces" "kubeconfig" -}}
{{- if hasKey $found . -}}{{- fail (printf "config.discovery.kubernetes.%s is the chart's to set: set `namespaces`" .) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- $usage := default dict $config.usage -}}
{{- if and (eq (default "body" $usage.source) "access_log") (not .Values.accessLog.enabled) -}}
{{- fail "config.usage.source is access_log: set `accessLog.enabled`, so that Envoy is told, too" -}}
{{- end -}}
{{- if and (hasKey $usage "source") (eq $usage.source "body") .Values.accessLog.enabled -}}
{{- fail "config.usage.source is body, and accessLog.enabled is set: leave out one of them" -}}
{{- end -}}
{{- if and .Values.store.url .Values.store.existingSecret -}}
{{- fail "store.url and store.existingSecret are two: leave out one of them" -}}
{{- end -}}
{{- $many := or (gt (int .Values.replicas) 1) .Values.autoscaling.enabled -}}
{{- if and $many (not .Values.store.url) (not .Values.store.existingSecret) (not .Values.valkey.enabled) -}}
{{- fail "several replicas need a store to share limits: set store.url, store.existingSecret or valkey.enabled, or replicas: 1" -}}
{{- end -}}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) -}}
{{- fail "autoscaling.minReplicas is more than maxReplicas" -}}
{{- end -}}
{{- if and (not .Values.gateway.create) (not .Values.gateway.name) -}}
{{- fail "gateway.create is false: set gateway.name to the Gateway that there is" -}}
{{- end -}}
{{- if and .Values.gateway.create .Values.gateway.namespace (ne .Values.gateway.namespace .Release.Namespace) -}}
{{- fail "gateway.namespace is of a Gateway that there is: set gateway.create to false, or leave it out" -}}
{{- end -}}
{{- $wait := include "gateway.messageTimeout" . | int64 -}}
{{- if gt $wait 600000 -}}
{{- fail "config.models.*.queue_wait and config.store.timeout: Envoy waits for the gateway's word for 600 s at most" -}}
{{- end -}}
{{- $least := add (include "gateway.storeTimeout" . | int64) (include "gateway.longestWait" . | int64) 1000 -}}
{{- if le $wait $least -}}
{{- fail (printf "gateway.messageTimeoutSeconds must be more than config.store.timeout, the longest queue_wait and 1 s together (%d ms)" $least) -}}
{{- end -}}
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
priorityClassName: {{ . }}
{{- end }}
{{- end -}}
