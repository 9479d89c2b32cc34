//! Keeps the switch running: starts it, adopts it, tells it to look, and starts it again when it has died.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::Weak;
use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;
use iaas_core::Error;
use iaas_core::Result;
use iaas_core::process::Adopted;
use iaas_core::process::Launcher;
use iaas_core::process::RoleHandle;
use uuid::Uuid;

use super::Settings;
use crate::folder::Folder;
use crate::switch::Status;
use crate::switch::role::Args;
use crate::switch::role::ROLE;

/// The one that looks after the switch of a host.
#[derive(Debug)]
pub(super) struct Keeper {
    me: Weak<Self>,
    launcher: Launcher,
    id: Uuid,
    args: Bytes,
    folder: Folder,
    /// The switch that was started or adopted last. Held while one is started, told to look, or ended.
    switch: tokio::sync::Mutex<Option<RoleHandle>>,
    trouble: Mutex<Option<Error>>,
}

impl Keeper {
    pub(super) fn new(settings: &Settings, folder: Folder) -> Arc<Self> {
        let offloads = settings.offloads;
        let args = Args {
            folder: std::path::absolute(settings.state.join("net")).unwrap_or_default(),
            checksum: offloads.checksum,
            tso4: offloads.tso4,
            tso6: offloads.tso6,
            uso: offloads.uso,
        };
        let mut encoded = Vec::new();
        // Writing paths and flags to memory cannot fail; an empty value would be refused by the switch.
        let _ = ciborium::into_writer(&args, &mut encoded);
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            launcher: Launcher::new(&settings.state, &settings.runtime, settings.role_binary.clone()),
            id: settings.host.uuid(),
            args: encoded.into(),
            folder,
            switch: tokio::sync::Mutex::default(),
            trouble: Mutex::default(),
        })
    }

    /// Why the switch does not do what is on disk, if it does not.
    pub(super) fn trouble(&self) -> Option<Error> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Brings the switch to what is on disk. If that fails it is tried again until it works.
    pub(super) async fn apply(&self) {
        if self.try_apply().await.is_err()
            && let Some(me) = self.me.upgrade()
        {
            tokio::spawn(async move { me.retry(FIRST_PAUSE).await });
        }
    }

    pub(super) async fn status(&self) -> Result<Status> {
        let handle = self.switch.lock().await.clone();
        let handle = handle.ok_or_else(|| Error::unavailable("the switch does not run"))?;
        let body = handle.call("status", Bytes::new(), Vec::new(), STATUS).await?;
        ciborium::from_reader(body.as_ref())
            .map_err(|e| Error::unavailable("the switch's answer cannot be read").because(&e))
    }

    pub(super) async fn pid(&self) -> Option<u32> {
        self.switch.lock().await.as_ref().map(RoleHandle::pid)
    }

    async fn try_apply(&self) -> Result<()> {
        let mut switch = self.switch.lock().await;
        let result = self.bring(&mut switch).await;
        if let Err(e) = &result {
            tracing::warn!(error = format!("{e:#}"), "the switch does not do what it shall");
        }
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = result.clone().err();
        result
    }

    async fn bring(&self, switch: &mut Option<RoleHandle>) -> Result<()> {
        let folder = self.folder.clone();
        let wanted = !super::blocking(move || folder.plugs()).await?.is_empty();
        if !wanted {
            // Also one that an earlier control process left.
            self.launcher.forget(ROLE, self.id).await?;
            *switch = None;
            return Ok(());
        }
        for _ in 0..2 {
            let handle = match switch.clone() {
                Some(handle) if handle.is_alive()? => handle,
                _ => self.start(switch).await?,
            };
            match handle.call("reload", Bytes::new(), Vec::new(), RELOAD).await {
                Ok(_) => return Ok(()),
                Err(e) if handle.is_alive()? => return Err(e),
                // It died over it: the next one reads the folder as it starts.
                Err(_) => {}
            }
        }
        Err(Error::unavailable("the switch dies as soon as it is told to look"))
    }

    /// Adopts the switch that runs, or starts one.
    async fn start(&self, switch: &mut Option<RoleHandle>) -> Result<RoleHandle> {
        let handle = match self.launcher.find(ROLE, self.id).await? {
            Some((_, Adopted::Alive(handle))) => handle,
            Some((_, Adopted::Unclear(e))) => return Err(e),
            Some((_, Adopted::Dead(_))) => {
                self.launcher.forget(ROLE, self.id).await?;
                self.spawn().await?
            }
            None => self.spawn().await?,
        };
        self.watch(handle.clone());
        *switch = Some(handle.clone());
        Ok(handle)
    }

    async fn spawn(&self) -> Result<RoleHandle> {
        self.launcher.spawn(ROLE, self.id, Bytes::new(), self.args.clone(), Vec::new()).await
    }

    /// Starts another when this one has died.
    fn watch(&self, handle: RoleHandle) {
        let me = self.me.clone();
        let since = Instant::now();
        tokio::spawn(async move {
            let watched = handle.exited().await;
            let Some(me) = me.upgrade() else { return };
            if let Err(e) = watched {
                tracing::warn!(error = format!("{e:#}"), "the switch cannot be watched");
            }
            // One that lived is replaced at once; one that dies as it starts, more and more slowly.
            let pause = if since.elapsed() < SHORT_LIFE { FIRST_PAUSE } else { Duration::ZERO };
            if me.is_current(&handle).await {
                tracing::warn!(pid = handle.pid(), "the switch has died");
                me.retry(pause).await;
            }
        });
    }

    async fn is_current(&self, handle: &RoleHandle) -> bool {
        self.switch.lock().await.as_ref().is_some_and(|now| now.identity() == handle.identity())
    }

    /// Brings the switch to what is on disk after `pause`, and again after longer ones until that works.
    async fn retry(&self, mut pause: Duration) {
        loop {
            tokio::time::sleep(pause).await;
            if self.try_apply().await.is_ok() {
                return;
            }
            pause = (pause * 2).clamp(FIRST_PAUSE, LAST_PAUSE);
        }
    }
}

/// How long the switch may take to compile a program and take it over.
const RELOAD: Duration = Duration::from_secs(10);
/// How long it may take to say how it is.
const STATUS: Duration = Duration::from_secs(2);
/// A life that is too short to be an accident.
const SHORT_LIFE: Duration = Duration::from_millis(200);
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_secs(1);
