"""The text files of a deployment, as templates of `string.Template`."""

APP = """\
# The app that Flower sends to the nodes. It holds no code: its components name modules that are installed there.
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "polyrank"
version = "$version"
description = "polyrank on Flower"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "polyrank"

[tool.flwr.app.components]
serverapp = "$serverapp"
clientapp = "$clientapp"

[tool.flwr.app.config]
folder = ""
"""

NGINX = """\
# The gateway. SuperLink serves nodes, runs and control on one port, and asks nobody who controls it for a key: so it
# stays on loopback, and only what nodes need leaves this machine.
daemon off;
worker_processes 1;
pid $folder/run/nginx.id;
error_log stderr;  # into the log of the process, which is rotated
events { worker_connections 1024; }
http {
  access_log off;
  server_tokens off;
  client_body_temp_path $folder/run/nginx-body;
  proxy_temp_path $folder/run/nginx-proxy;
  fastcgi_temp_path $folder/run/nginx-fastcgi;
  uwsgi_temp_path $folder/run/nginx-uwsgi;
  scgi_temp_path $folder/run/nginx-scgi;
  server {
    listen $listen ssl;
    ssl_certificate $folder/server/server.crt;
    ssl_certificate_key $folder/server/server.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    client_max_body_size 32m;  # Flower sends arrays in pieces of 5 MB
    proxy_request_buffering off;  # what is sent goes through memory, and is not written to this disk on its way
    proxy_buffering off;
    proxy_read_timeout 300s;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_ssl_verify on;
    proxy_ssl_trusted_certificate $folder/ca/ca.crt;
    proxy_ssl_name localhost;
    # With a path in proxy_pass, what is passed on is the path that was compared, and not one that reads otherwise.
    location /v1/fleet/ { proxy_pass https://$superlink/v1/fleet/; }
    location = /health { proxy_pass https://$superlink/health; }
    location / { return 403; }
  }
}
"""

_KEPT = """\
Restart=on-failure
RestartSec=10
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
LockPersonality=yes

[Install]
WantedBy=multi-user.target
"""

SERVER_UNIT = (
    """\
[Unit]
Description=$description
After=network-online.target$after
Wants=network-online.target

[Service]
User=$user
WorkingDirectory=$folder
ExecStart=$command
# All else is read-only: runs and downloaded models are written here. Add a path to have them elsewhere.
ReadWritePaths=$folder
Environment=HF_HOME=$folder/models
MemoryMax=$memory
CPUQuota=$cpu
"""
    + _KEPT
)

NODE_UNIT = (
    """\
# A site's node: `systemctl enable --now polyrank-node@$name`. The instance is its folder's name in /var/lib/polyrank.
# RestartSec: Flower's node exits, rather than waits, while the server still holds the lease of the process before it.
[Unit]
Description=polyrank node %i
After=network-online.target time-sync.target
Wants=network-online.target time-sync.target

[Service]
User=polyrank
WorkingDirectory=/var/lib/polyrank/%i
ExecStart=/opt/polyrank/bin/polyrank deploy join /var/lib/polyrank/%i --foreground
# All else is read-only: downloaded models are written here, too.
ReadWritePaths=/var/lib/polyrank/%i
Environment=HF_HOME=/var/lib/polyrank/%i/models
# What this machine can spare: 100% is one core. Say as many cores under `threads` in site.yaml.
MemoryMax=80%
CPUQuota=400%
"""
    + _KEPT
)

SITE = """\
# What node $name is made of, and what it allows. This file and the data stay here; the server learns how many examples
# there are, and the resources that are stated below. `polyrank deploy check .` looks whether all of it goes together,
# and says what this site will answer. docs/deploy.md explains every key.
model: ./model                 # this site's copy of the base model: a folder, or a name on the hub
data:
  name: files
  train: ./train.parquet       # or .csv, .jsonl, .npz; all of its examples are trained on
  test: ./train.parquet        # is not read for training; the same file will do
  text: text                   # the column of the inputs; `image: ...` in its place for images
  label: label
  # Instructions with responses: name: instructions, and response, instruction, input: their columns; see docs/data.md.
# What the machine can afford: a rank, or the memory and links from which the server derives one. The experiment's
# method says which it takes. A site from which no rank follows is left out of the run.
# rank: 8                      # a LoRA rank per module
# memory: 16 GiB               # of the accelerator; detect: what is free on it
# uplink: 20 Mbit/s
# downlink: 100 Mbit/s
# device: auto                 # cuda, cpu, ...
# threads: 4                   # CPU threads; all cores if left out

# What it allows. A new run waits until `polyrank site approve . RUN`; auto: it takes part at once.
approve: ask
limits:                        # of one task; more is refused before anything is trained
  steps: 10000
  epochs: 20
  seconds: 3600
# memory: 8 GiB
# What its answers may tell of the data. Without a budget, nothing bounds it. Needs polyrank's extra `privacy`.
# budget:
#   epsilon: 8                 # of all answers ever given, in all runs
#   run: 2                     # of any one run
#   delta: 1.0e-6              # below one over the number of examples
# privacy:                     # and the least noise in a task
#   examples: {clip: 1.0, noise: 1.0}
"""

NODE_README = """\
# Node $name

This folder makes a machine the node `$name` of federation `$federation`. `node.key` is this node's identity:
whoever has it can take part under this name. It was made here. Keep it on this machine, readable by one user.

1. Send `request.json` to the server's operator. It holds no secret. Tell them the key's fingerprint over another
   channel, the telephone for example: `polyrank deploy request` has shown it, and `ssh-keygen -l -f node.key` does.
2. Put the answer in: `polyrank deploy accept . $name.json`. Compare the authority's fingerprint in the same way.
3. Say in `site.yaml` where this site's data is, what the machine can afford, and what the site allows. Then
   `polyrank deploy check .` loads model and data, trains a step, and says what the site will answer. It dials nobody.
   The code that trains is the one installed here (`pip install '.[flower]'`, from a checkout); the server sends none.
4. Keep the clock right (NTP): the server refuses a node whose clock is over 5 seconds ahead or 5 minutes behind.
5. Start: `polyrank deploy join .`. It dials the server, which must be reachable; nothing dials this machine.

`polyrank deploy status .` says whether it runs, `polyrank deploy logs . --follow` what it does, and
`polyrank deploy down .` ends it. A new run waits for you: `polyrank site runs .` shows it and what it would cost,
`polyrank site approve . RUN` or `deny` decides, `polyrank site pause .` stops all answers, and `polyrank site log .`
says who asked what. With systemd: copy this folder to `/var/lib/polyrank/$name`, owned by the user that
runs it, and `polyrank-node@.service` to `/etc/systemd/system/`; set in it `User=`, the path of `polyrank`, and
`MemoryMax=` and `CPUQuota=`; then
`systemctl enable --now polyrank-node@$name`.

| file | what it is |
|---|---|
| `node.key` | the private key; never leaves this machine |
| `next.key` | while the key is rotated: the one that takes its place |
| `request.json` | what the server's operator is sent; no secret |
| `ca.crt` | the authority that the server's certificate is checked against |
| `node.json` | the node's name and the server's address |
| `site.yaml` | this site's configuration; it is not sent |
| `ledger.json` | what the answers have told of the data; whoever deletes it forgets what was spent: back it up |
| `runs.json`, `history.jsonl` | what was decided on each run; who asked what, and what was answered |
"""

README = """\
# A polyrank deployment

The server is dialled as $public. This is federation `$federation`: sites name it when they ask.

Everything below is run by one user, in an environment with polyrank's extra `flower`. Nothing in this folder
but `answers/` leaves the machine.

## Server

```sh
polyrank deploy up $folder --gateway        # SuperLink, SuperExec, registrar and nginx; registers the nodes' keys
polyrank deploy status $folder              # processes, nodes, runs, and until when certificates and keys are valid
polyrank deploy run $folder FILE.yaml       # a run, followed to its end
polyrank deploy resume $folder runs/NAME    # follows a run again, or continues it
polyrank deploy logs $folder superlink      # or superexec, registrar, gateway, supervisor
polyrank deploy backup $folder --out FILE   # keys, database and runs in one file; `restore` makes a folder of it
polyrank deploy down $folder                # ends all of it; a later `up` goes on with the same nodes
```

With systemd instead of `up`:

```sh
sudo cp $folder/systemd/*.service /etc/systemd/system/
sudo systemctl enable --now polyrank-superlink polyrank-superexec polyrank-registrar polyrank-gateway
polyrank deploy register $folder
```

Open port $port to the sites, and no other: the SuperLink's own port, $superlink_port, must stay on loopback, because
whoever reaches it can start runs.

## Sites

A site makes its key itself, and sends a request, which holds no secret:

```sh
polyrank deploy request NAME --federation $federation --out NAME      # at the site; sends NAME/request.json
polyrank deploy add $folder request.json                              # here; compare the fingerprint with the site's
polyrank deploy accept NAME NAME.json                                 # at the site, with NAME.json of answers/
polyrank deploy join NAME                                             # at the site
```

## Keys

| file | what it is | when it is lost or known to others |
|---|---|---|
| `ca/ca.key` | signs certificates, for `renew` alone: keep it elsewhere | `polyrank deploy renew --authority new` |
| `server/server.key` | the server's identity | `polyrank deploy renew $folder` |
| `server/superexec.secret` | lets SuperExec take work from SuperLink | replace the file, restart |
| `node.key`, at a site | a node's identity | `polyrank deploy remove $folder NAME` |

A site whose key was removed, or has ended, makes another: `polyrank deploy request NAME --rotate`. Then it is added
again.
"""
