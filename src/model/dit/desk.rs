//! What the launches of a block read, at fixed addresses on the card, and their recording: a graph reads the same memory at
//! every replay, so what changes is copied there first.

use candle_core::{Device, Tensor, TensorId};

use super::{AudioTokens, BlockAudio, InjectorAudio};
use crate::model::{
    Error, Result,
    nn::{Rope, Slot},
};

/// The inputs of a block's way through the transformer.
#[derive(Debug)]
pub(super) struct Desk {
    /// Tokens in, tokens out.
    pub tokens: Tensor,
    /// Of the block's position.
    pub rope: Rope,
    /// Where its keys and values go.
    pub slot: Slot,
    /// What it hears.
    pub audio: BlockAudio,
    /// Which audio and which rotation lie there.
    heard: TensorId,
    turned: TensorId,
    numbers: [u32; 3],
}

impl Desk {
    /// Lays a block's inputs out; makes the desk when there is none. `queries`: tokens of the whole block, which are more
    /// than `tokens` where ranks share it.
    pub(super) fn lay<'a>(
        desk: &'a mut Option<Self>,
        tokens: &Tensor,
        rope: &Rope,
        slot: &Slot,
        queries: usize,
        audio: &BlockAudio,
    ) -> Result<&'a Self> {
        let numbers = slot.numbers(queries);
        if let Some(desk) = desk {
            desk.tokens.slice_set(&tokens.contiguous()?, 0, 0)?;
            if desk.turned != rope.table().id() {
                desk.rope.table().slice_set(rope.table(), 0, 0)?;
                desk.turned = rope.table().id();
            }
            if let (true, Some(card)) = (desk.numbers != numbers, &desk.slot.card) {
                card.slice_set(&Tensor::new(&numbers, tokens.device())?, 0, 0)?;
                desk.numbers = numbers;
                // Where nothing is fused, the host's numbers are read.
                desk.slot = Slot { card: Some(card.clone()), ..slot.clone() };
            }
            if desk.heard != audio.tokens.local.id() {
                for (here, new) in desk.audio.injectors.iter().zip(&audio.injectors) {
                    for (here, new) in here.tensors().into_iter().zip(new.tensors()) {
                        here.slice_set(&new.contiguous()?, 0, 0)?;
                    }
                }
                desk.heard = audio.tokens.local.id();
            }
        } else {
            let injectors: Result<_> = audio.injectors.iter().map(InjectorAudio::copy).collect();
            let own = &audio.tokens;
            *desk = Some(Self {
                tokens: tokens.copy()?,
                rope: Rope::from_table(rope.table().copy()?)?,
                slot: slot.clone().on(tokens.device(), queries)?,
                audio: BlockAudio {
                    injectors: injectors?,
                    tokens: AudioTokens { local: own.local.clone(), global: own.global.clone(), frames: own.frames },
                },
                heard: own.local.id(),
                turned: rope.table().id(),
                numbers,
            });
        }
        desk.as_ref().ok_or_else(|| Error::Input("the desk is empty".into()))
    }
}

/// A step that is run by its launches at first, and by a recorded graph from its second time on.
#[derive(Debug, Default)]
pub(super) enum Replay {
    /// It did not run yet: products and attentions choose their kernels when it does.
    #[default]
    Cold,
    Warm,
    #[cfg(feature = "cuda")]
    Recorded(crate::model::kernels::cuda::graph::Graph),
    /// It cannot be recorded: something in it is no plain launch (f32, blocks of ggml, odd sizes).
    #[cfg(feature = "cuda")]
    Refused,
}

impl Replay {
    /// Does what `work` launches.
    pub(super) fn run(&mut self, device: &Device, graphs: bool, mut work: impl FnMut() -> Result<()>) -> Result<()> {
        #[cfg(feature = "cuda")]
        if graphs {
            if matches!(self, Replay::Warm) {
                let recorded = crate::model::kernels::cuda::graph::Graph::record(device, &mut work);
                *self = recorded.map_or(Replay::Refused, Replay::Recorded);
            }
            if let Replay::Recorded(graph) = self {
                return graph.launch();
            }
        }
        let _ = (device, graphs);
        work()?;
        if matches!(self, Replay::Cold) {
            *self = Replay::Warm;
        }
        Ok(())
    }
}
