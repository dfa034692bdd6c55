{{/*
What values cannot be together, and what of `config` is the chart's to set. Nothing is rendered then, so that nothing is
changed. What each value may be by itself is in values.schema.json.
*/}}
{{- define "gateway.check" -}}
{{- include "gateway.checkOurs" . -}}
{{- include "gateway.within" (dict "value" .Values.config "bounds" (.Files.Get "files/bounds.json" | fromJson) "at" "config") -}}
{{- include "gateway.checkNames" . -}}
{{- include "gateway.checkPods" . -}}
{{- include "gateway.checkStore" . -}}
{{- include "gateway.checkGateway" . -}}
{{- end -}}

{{/* What the chart sets itself. */}}
{{- define "gateway.checkOurs" -}}
{{- $config := .Values.config -}}
{{- $ours := dict "envoy" "what Envoy is told is in `gateway`" "controller" "set `controller.mode` and `namespaces`" -}}
{{- range $key, $instead := $ours -}}
{{- if hasKey $config $key -}}{{- fail (printf "config.%s is the chart's to set: %s" $key $instead) -}}{{- end -}}
{{- end -}}
{{- $within := list
  (list "listen" "grpc" "set `listenAddress`") (list "listen" "http" "set `listenAddress`")
  (list "listen" "tls" "Envoy asks without, which `networkPolicy` keeps to Envoy")
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
{{- if $found.pool -}}
{{- fail "config.discovery.kubernetes.pool is for gateways that have an endpoint picker: this chart is for Envoy Gateway" -}}
{{- end -}}
{{- end -}}
{{- $usage := default dict $config.usage -}}
{{- if and (eq (default "body" $usage.source) "access_log") (not .Values.accessLog.enabled) -}}
{{- fail "config.usage.source is access_log: set `accessLog.enabled`, so that Envoy is told, too" -}}
{{- end -}}
{{- if and (hasKey $usage "source") (eq $usage.source "body") .Values.accessLog.enabled -}}
{{- fail "config.usage.source is body, and accessLog.enabled is set: leave out one of them" -}}
{{- end -}}
{{- $secrets := dict "config.discovery.kubernetes" (ternary $found dict (kindIs "map" $found)) -}}
{{- range $number, $pod := default list $config.pods -}}{{- $_ := set $secrets (printf "config.pods[%d]" $number) $pod -}}{{- end -}}
{{- range $at, $part := $secrets -}}
{{- if $part.api_key -}}
{{- fail (printf "%s.api_key would be no secret in a ConfigMap: mount a Secret by extraVolumes, and set api_key_file" $at) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Durations and sizes of the configuration, which are texts: (dict "value" VALUE "bounds" BOUNDS "at" PATH). */}}
{{- define "gateway.within" -}}
{{- $of := . -}}
{{- if hasKey .bounds "most" -}}
{{- $duration := hasPrefix "duration" .bounds.kind -}}
{{- $found := include (ternary "gateway.duration" "gateway.size" $duration) .value | float64 -}}
{{- if or (lt $found (float64 .bounds.least)) (gt $found (float64 .bounds.most)) -}}
{{- fail (printf "%s is %v: expected a %s" .at .value .bounds.kind) -}}
{{- end -}}
{{- if ne $found (floor $found) -}}
{{- fail (printf "%s is %v: expected whole %s" .at .value (ternary "milliseconds" "bytes" $duration)) -}}
{{- end -}}
{{- else if hasKey .bounds "*" -}}
{{- range $name, $value := .value -}}
{{- include "gateway.within" (dict "value" $value "bounds" (get $of.bounds "*") "at" (printf "%s.%v" $of.at $name)) -}}
{{- end -}}
{{- else if kindIs "map" .value -}}
{{- range $name, $bounds := .bounds -}}
{{- $value := get $of.value $name -}}
{{- if and (hasKey $of.value $name) (not (kindIs "invalid" $value)) -}}
{{- include "gateway.within" (dict "value" $value "bounds" $bounds "at" (printf "%s.%s" $of.at $name)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "gateway.checkNames" -}}
{{- $name := include "gateway.fullname" . -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" $name) -}}
{{- fail (printf "no Service can have the name %s: set fullnameOverride" $name) -}}
{{- end -}}
{{- range list "name" "instance" "component" -}}
{{- if hasKey $.Values.podLabels (printf "app.kubernetes.io/%s" .) -}}
{{- fail (printf "podLabels: app.kubernetes.io/%s says whose the pods are, and is the chart's to set" .) -}}
{{- end -}}
{{- end -}}
{{- range .Values.extraEnv -}}
{{- if or (hasPrefix "GATEWAY_" .name) (eq .name "STORE_PASSWORD") -}}
{{- fail (printf "extraEnv: %s is a setting of the gateway: set it in `config`" .name) -}}
{{- end -}}
{{- end -}}
{{- range .Values.extraVolumes -}}
{{- if has .name (list "config" "secret" "store") -}}
{{- fail (printf "extraVolumes: the chart has a volume %s of its own: take another name" .name) -}}
{{- end -}}
{{- end -}}
{{- $same := eq (include "gateway.account" .) (include "gateway.controllerAccount" .) -}}
{{- $deployed := eq .Values.controller.mode "deployment" -}}
{{- if and $deployed $same .Values.serviceAccount.create .Values.controller.serviceAccount.create -}}
{{- fail "serviceAccount.name and controller.serviceAccount.name are one: what clients reach would have the right to write routes" -}}
{{- end -}}
{{- if .Values.rbac.create -}}
{{- if and (include "gateway.asks" .) (eq (include "gateway.account" .) "default") -}}
{{- fail "serviceAccount: every pod of the namespace would have the rights of its account `default`: name another" -}}
{{- end -}}
{{- if and $deployed (eq (include "gateway.controllerAccount" .) "default") -}}
{{- fail "controller.serviceAccount: every pod of the namespace would have the rights of its account `default`: name another" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "gateway.checkPods" -}}
{{- $resources := dict "resources" .Values.resources "controller.resources" .Values.controller.resources "valkey.resources" .Values.valkey.resources -}}
{{- range $at, $of := $resources -}}
{{- range $name, $request := default dict $of.requests -}}
{{- $limit := get (default dict $of.limits) $name -}}
{{- if and (ne (toString $limit) "") (gt (include "gateway.quantity" $request | float64) (include "gateway.quantity" $limit | float64)) -}}
{{- fail (printf "%s.requests.%s is more than %s.limits.%s" $at $name $at $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $bodies := include "gateway.bodiesInMemory" . | float64 -}}
{{- if lt $bodies (include "gateway.maxBodyBytes" . | float64) -}}
{{- fail (printf "config.limits.bodies_in_memory (%.0f bytes) must be at least config.limits.max_body_bytes" $bodies) -}}
{{- end -}}
{{- with (default dict .Values.resources.limits).memory -}}
{{- if lt (include "gateway.quantity" . | float64) (mulf 2 $bodies) -}}
{{- fail (printf "resources.limits.memory must be twice config.limits.bodies_in_memory (%.0f bytes) at the very least" $bodies) -}}
{{- end -}}
{{- end -}}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) -}}
{{- fail "autoscaling.minReplicas is more than maxReplicas" -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (not (default dict .Values.resources.requests).cpu) -}}
{{- fail "autoscaling goes by the share of resources.requests.cpu that is used: set it" -}}
{{- end -}}
{{- $fewest := include "gateway.fewest" . | int -}}
{{- $away := .Values.podDisruptionBudget.maxUnavailable -}}
{{- if kindIs "string" $away -}}
{{- $away = mulf (trimSuffix "%" $away | float64) $fewest 0.01 | ceil -}}
{{- end -}}
{{- if and .Values.podDisruptionBudget.enabled (gt $fewest 1) (ge (int $away) $fewest) -}}
{{- fail (printf "podDisruptionBudget.maxUnavailable would let all %d gateways go at once" $fewest) -}}
{{- end -}}
{{- end -}}

{{- define "gateway.checkStore" -}}
{{- if and .Values.store.url .Values.store.existingSecret -}}
{{- fail "store.url and store.existingSecret are two: leave out one of them" -}}
{{- end -}}
{{- $many := or (gt (int .Values.replicas) 1) .Values.autoscaling.enabled -}}
{{- if and $many (not (include "gateway.storeSecret" .)) (not .Values.valkey.enabled) -}}
{{- fail "several replicas need a store to share limits: set store.url, store.existingSecret or valkey.enabled, or replicas: 1" -}}
{{- end -}}
{{- if include "gateway.ownStore" . -}}
{{- $values := .Values.valkey -}}
{{- $most := include "gateway.number" (dict "of" $values.maxMemory "units" (dict "kb" 1024 "mb" 1048576 "gb" 1073741824)) | float64 -}}
{{- with (default dict $values.resources.limits).memory -}}
{{- if le (include "gateway.quantity" . | float64) $most -}}
{{- fail "valkey.resources.limits.memory must be more than valkey.maxMemory, which is not all that it takes" -}}
{{- end -}}
{{- end -}}
{{- /* Kubernetes keeps what a StatefulSet's volume was made by, and would refuse half of an upgrade. */ -}}
{{- $name := printf "%s-valkey" (include "gateway.fullname" .) -}}
{{- with lookup "apps/v1" "StatefulSet" .Release.Namespace $name -}}
{{- $claim := dig "spec" (dict) (first (default (list (dict)) .spec.volumeClaimTemplates)) -}}
{{- $changed := "" -}}
{{- if ne $values.persistence.enabled (gt (len $claim) 0) -}}
{{- $changed = "enabled" -}}
{{- else if $claim -}}
{{- if ne (include "gateway.quantity" $claim.resources.requests.storage) (include "gateway.quantity" $values.persistence.size) -}}
{{- $changed = "size" -}}
{{- else if ne (toJson $claim.accessModes) (toJson $values.persistence.accessModes) -}}
{{- $changed = "accessModes" -}}
{{- else if ne (default "" $claim.storageClassName) $values.persistence.storageClassName -}}
{{- $changed = "storageClassName" -}}
{{- end -}}
{{- end -}}
{{- if $changed -}}
{{- fail (printf "valkey.persistence.%s cannot change while StatefulSet %s is there: `kubectl -n %s delete statefulset %s --cascade=orphan` leaves its pod and its volume, and lets this upgrade make another" $changed $name $.Release.Namespace $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "gateway.checkGateway" -}}
{{- if and (not .Values.gateway.create) (not .Values.gateway.name) -}}
{{- fail "gateway.create is false: set gateway.name to the Gateway that there is" -}}
{{- end -}}
{{- if and .Values.gateway.create .Values.gateway.namespace (ne .Values.gateway.namespace .Release.Namespace) -}}
{{- fail "gateway.namespace is of a Gateway that there is: set gateway.create to false, or leave it out" -}}
{{- end -}}
{{- if and .Values.gateway.create .Values.gateway.tls.secretName (eq (int .Values.gateway.port) (int .Values.gateway.tls.port)) -}}
{{- fail "gateway.port and gateway.tls.port are one: HTTP and HTTPS need a port each" -}}
{{- end -}}
{{- if and .Values.accessLog.enabled (ne .Values.gateway.create (empty .Values.accessLog.listeners)) -}}
{{- fail "accessLog.listeners names the listeners of a Gateway that there is: set it with gateway.create false, and only then" -}}
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
