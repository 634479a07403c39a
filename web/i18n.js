// English and Chinese, by the browser's language (`?lang=en|zh` overrides it). The English sentence is the key: a
// sentence that has no translation is shown as it is.

const wanted = new URLSearchParams(location.search).get('lang') || (navigator.languages?.[0] ?? navigator.language ?? 'en');
export const language = /^zh\b/i.test(wanted) ? 'zh' : 'en';

const ZH = {
  // the page
  'Speak, and a presenter speaks with you.': '你说话，主播与你同声说话。',
  'Skip to Start': '跳到“开始”',
  Ready: '就绪',
  Presenter: '主播',
  'The presenter': '主播',
  Controls: '控制',
  Start: '开始',
  Mute: '静音',
  Muted: '已静音',
  Voice: '声音',
  'Full screen': '全屏',
  Stop: '结束',
  'Computer-made picture': '画面由人工智能生成',
  'Choose a presenter, press Start and speak.': '选择一位主播，按“开始”，然后说话。',
  'Loading…': '加载中…',
  'Use a picture of your own…': '使用自己的图片…',
  'Sending…': '正在上传…',
  'The person in the picture has agreed to be shown speaking.': '图片中的人已同意被展示为说话的样子。',
  'Please confirm first that the person in the picture has agreed.': '请先确认图片中的人已同意。',
  'The built-in engine is small and learnt from drawn presenters: it moves a photograph in their manner, likeness suffers, and some it has to refuse. Best is one face from the front, in the middle, in even light.':
    '内置引擎很小，只学过手绘主播：它会按手绘的方式驱动照片，相似度会下降，有些照片只能拒绝。最好是一张正面、居中、光线均匀的脸。',
  'The service runs its test card: no face is made, and a picture only appears in its corner.': '服务正在运行测试卡：不生成人脸，图片只出现在角落。',
  Microphone: '麦克风',
  'Microphone level': '麦克风音量',
  'Microphone device': '麦克风设备',
  'Chosen when you start': '开始时选择',
  'With loudspeakers your own voice comes back a moment later; headphones are calmer.': '用扬声器时，你会稍后听到自己的声音；戴耳机更安静。',
  Numbers: '数据',
  'Frames per second': '每秒帧数',
  'Voice to screen': '从声音到画面',
  'Frames held · skipped': '保持 · 跳过的帧',
  'Packets lost, up · down': '丢包，上行 · 下行',
  Bitrate: '码率',
  'Engine load': '引擎负载',
  'Time per block': '每块用时',
  Ingest: '接收',
  Features: '特征',
  Generation: '生成',
  Decode: '解码',
  Encode: '编码',
  'This page needs JavaScript to reach your microphone and to show the presenter.': '本页需要 JavaScript 才能使用麦克风并显示主播。',
  // states
  'Your browser may ask for the microphone.': '浏览器可能会询问麦克风权限。',
  'Speak: the presenter speaks with you.': '请说话：主播与你同声说话。',
  'Asking for the microphone…': '正在请求麦克风…',
  'Connecting…': '正在连接…',
  Connected: '已连接',
  'Connection lost, reconnecting…': '连接中断，正在重连…',
  'Connection lost, starting anew…': '连接中断，正在重新开始…',
  'Changing the presenter…': '正在更换主播…',
  'Preparing the presenter…': '正在准备主播…',
  Listening: '正在聆听',
  Speaking: '正在说话',
  'Ending…': '正在结束…',
  Ended: '已结束',
  'Picture interrupted…': '画面中断…',
  'You are muted.': '你已静音。',
  'The engine cannot keep up on this machine just now: the picture stutters.': '这台机器此刻跟不上：画面会卡顿。',
  'Nothing is heard from your microphone. Is it switched off, or is another one chosen?': '听不到你的麦克风。它关了吗？还是选了另一个？',
  'Try again': '重试',
  'Try now': '立即重试',
  'Trying again in {s} s.': '{s} 秒后重试。',
  '{text} This page tries again by itself.': '{text}本页会自动重试。',
  '{n} of {of}': '{n} / {of}',
  '({name} engine; a block lasts {ms} ms)': '（{name} 引擎；每块 {ms} 毫秒）',
  'The large model (Wan2.2-S2V) moves photographs and drawings of one person; a picture is cropped to {width} by {height}.':
    '大模型（Wan2.2-S2V）可以驱动单人照片和画像；图片会裁剪到 {width}×{height}。',
  'Your picture': '你的图片',
  'Your design': '你的设计',
  'Design a presenter': '设计一位主播',
  'The designed presenter': '设计的主播',
  'Use this look': '使用这个形象',
  'Another one': '换一个',
  'The designed look that is most like your picture:': '与你的图片最相近的设计形象：',
  any: '随机', figure: '体态', age: '年龄', skin: '肤色', hair: '发型', 'hair colour': '发色', eyes: '眼睛', glasses: '眼镜', beard: '胡须', head: '头饰', clothes: '衣着', background: '背景',
  feminine: '女性', masculine: '男性', young: '年轻', middle: '中年', old: '年长', fair: '白皙', light: '浅色', tan: '小麦色', olive: '橄榄色', brown: '棕色', dark: '深色', deep: '黝黑',
  cropped: '寸头', parted: '分头', bob: '波波头', long: '长发', bun: '发髻', curls: '卷发', quiff: '飞机头', waves: '波浪', receding: '谢顶', ponytail: '马尾',
  black: '黑色', 'dark brown': '深棕', chestnut: '栗色', blond: '金色', red: '红色', grey: '灰色', white: '白色', blue: '蓝色', green: '绿色', hazel: '榛色',
  none: '无', round: '圆框', tortoiseshell: '玳瑁', stubble: '胡茬', full: '络腮', headscarf: '头巾', turban: '缠头巾', 'knitted cap': '针织帽', hat: '礼帽',
  'round neck': '圆领', jacket: '外套', 'high collar': '高领', 'v neck': 'V 领', shirt: '衬衫', dress: '连衣裙', plain: '纯色', lights: '光斑', room: '房间', studio: '影棚',
  'Microphone {n}': '麦克风 {n}',
  'The picture is larger than {mb} MB. Make it smaller and try again.': '图片超过 {mb} MB，请缩小后重试。',
  'The picture could not be sent. Check the connection and try again.': '图片无法上传。请检查网络后重试。',
  'The server did not accept this picture.': '服务器未接受这张图片。',
  'No presenters are built in. Use a picture of your own.': '没有内置主播，请使用自己的图片。',
  'The server does not answer. Is it still running? Reload this page when it is.': '服务器没有响应。它还在运行吗？恢复后请刷新本页。',
  // problems
  'This address is not secure': '此地址不安全',
  'Browsers give microphones only to https:// pages and to this same machine. Open the https:// address of this service, or on its own machine http://localhost:{port}/.':
    '浏览器只允许 https:// 页面和本机使用麦克风。请打开本服务的 https:// 地址，或在运行服务的机器上打开 http://localhost:{port}/。',
  'This browser cannot hold the conversation': '此浏览器无法进行对话',
  'It needs WebRTC with H.264. Use a current Chrome, Edge or Safari; Firefox fetches its H.264 add-on a minute after its first start.':
    '需要支持 H.264 的 WebRTC。请使用新版 Chrome、Edge 或 Safari；Firefox 首次启动约一分钟后才会下载 H.264 组件。',
  'This browser cannot play the video': '此浏览器无法播放视频',
  'It offers no H.264 for calls. Use a current Chrome, Edge or Safari; Firefox fetches its H.264 add-on a minute after its first start.':
    '它的通话不支持 H.264。请使用新版 Chrome、Edge 或 Safari；Firefox 首次启动约一分钟后才会下载 H.264 组件。',
  'The microphone was refused': '麦克风被拒绝',
  'Allow it with the icon beside the address (or in the browser’s settings for this site), then press Start again.':
    '请点地址栏旁的图标（或在浏览器的网站设置中）允许麦克风，然后再按“开始”。',
  'No microphone was found': '未找到麦克风',
  'No microphone': '没有麦克风',
  'Connect one, or switch it on, then press Start again.': '请连接或打开麦克风，然后再按“开始”。',
  'The microphone cannot be opened': '无法打开麦克风',
  'Another program may be using it. Close that program, then press Start again.': '可能有其他程序正在使用它。请关闭该程序，然后再按“开始”。',
  'The chosen microphone is gone': '所选麦克风已不在',
  'Choose another one in the list, then press Start again.': '请在列表中另选一个，然后再按“开始”。',
  'The microphone does not work': '麦克风不能用',
  'The browser says: {words}. Try another microphone or another browser.': '浏览器提示：{words}。请换一个麦克风或浏览器。',
  'The browser says: {words}': '浏览器提示：{words}',
  'The connection could not be made': '无法建立连接',
  'The connection was lost': '连接已中断',
  'Check the network, then try again.': '请检查网络后重试。',
  'A new one is being tried.': '正在尝试新的连接。',
  'The conversation ended': '对话已结束',
  'The conversation has ended': '对话已结束',
  'The server had already closed it.': '服务器已先行结束。',
  'The server closed it.': '服务器已结束对话。',
  'The server does not answer': '服务器没有响应',
  'Check that it is still running and that this device is online, then try again.': '请确认服务器仍在运行、本设备在线，然后重试。',
  'No connection for sound and picture': '声音和画面没有通路',
  'The page reached the server, but its media ports cannot be reached: a firewall or VPN may block UDP. Try another network, or ask whoever runs the server to enable ICE over TCP or a TURN server.':
    '网页能连到服务器，但媒体端口不通：防火墙或 VPN 可能拦截了 UDP。请换个网络，或请服务器管理员启用 TCP 上的 ICE 或 TURN 服务器。',
  'The server answered {status}.': '服务器返回 {status}。',
  'All places are taken': '座位已满',
  'The server is closing': '服务器正在关闭',
  'The service is closing': '服务正在关闭',
  'The server cannot serve you now': '服务器暂时无法为你服务',
  'The server did not accept this': '服务器未接受',
  'This picture cannot be used': '这张图片不能用',
  'The engine has failed': '引擎出错',
  'The presenter was not ready in time': '主播未能及时就绪',
  'No connection came about': '未能建立连接',
  'The time is up': '时间到',
  'Nobody spoke for a long time': '很久没有人说话',
  // status
  'Loquent status': 'Loquent 状态', Service: '服务', Engine: '引擎', Conversations: '对话',
  'Nobody is in a conversation.': '此刻没有对话。',
  'The engine is being built anew': '引擎正在重建',
  Version: '版本', 'Running for': '已运行', 'Conversations so far': '累计对话', 'HTTP connections': 'HTTP 连接', WebSockets: 'WebSocket',
  'Players and publishers': '播放与发布连接', 'Uploaded pictures': '上传的图片', 'Memory free': '可用内存', 'Memory free on the cards': '显卡可用内存', 'Places taken': '已占座位',
  'Real-time factor': '实时系数', 'Block (median, 95 %)': '每块用时（中位，95 %）', 'A block lasts': '每块时长', 'Hearing, drawing, decoding': '听、画、解码',
  'Lag now, worst': '滞后（当前，最差）', 'Blocks made': '已生成块', 'Built anew': '重建次数',
  Id: '编号', State: '状态', Since: '已持续', Watching: '观看', 'Pictures a second': '每秒画面', Delay: '延迟', 'Held and skipped': '重复与跳过', 'Waiting speech': '待说',
  'Lost in and out': '丢包（进、出）', Silent: '静默', Ending: '结束中', Preparing: '准备中',
  'Other machines cannot be reached': '无法联系其他机器', Cluster: '集群', 'This node': '本节点', Connected: '已连接', 'Away for {time}': '已断开 {time}', Why: '原因', 'Nodes alive': '在线节点', Node: '节点', Heard: '上次消息', Address: '地址',
  '{alive} ({listed} are listed)': '{alive}（列出 {listed} 个）', '{seconds} s ago': '{seconds} 秒前', 'Has left': '已退出', Dead: '失联', 'Not known': '未知',
  // overlay and bot
  'Waiting for the presenter…': '正在等待主播…',
  'This address names no session: add ?session=ID&token=TOKEN, as the service gave them.': '此地址没有指定会话：请加上服务给出的 ?session=ID&token=TOKEN。',
};

/** What the server says, by its code, for readers who do not read English. */
const ZH_CODES = {
  full: '此刻所有主播都在对话中。',
  engine_restarting: '绘制主播的引擎正在重建，请几秒后重试。',
  no_memory: '内存不足，请稍后重试。',
  draining: '服务正在停止，不再接受新的对话。',
  no_key: '此服务需要密钥：请用 /#key=KEY 打开本页，密钥由服务管理员提供。',
  wrong_key: '密钥无效，可能已被收回。',
  wrong_scope: '此密钥没有这项权限。',
  too_many: '请求太多，请稍候。',
  too_many_sessions: '你的对话数已达上限，请先结束一个。',
  service_closing: '服务正在重启，请一分钟后再按“开始”。',
  engine_failed: '绘制主播的引擎出错，请一分钟后重试。',
  cluster_unreachable: '各机器暂时无法互相联系，请稍后重试。',
  no_worker: '此刻没有机器能绘制主播，请稍后重试。',
  worker_gone: '主持此对话的机器已不在，请重新开始。',
  worker_absent: '主持此对话的机器暂时没有回应，请稍后重试。',
  worker_late: '被询问的机器未能及时回应，请重试。',
  codec_failed: '声音或画面无法编码，请按“开始”重试。',
  no_port: '没有空闲的媒体端口，请稍后重试。',
  portrait_refused: '引擎无法使用这张图片。内置引擎只认识风格与内置主播相近的手绘正面人像，照片需要大模型。',
  unusable_picture: '这张图片无法读取，请使用 PNG、JPEG 或 WebP。',
  small_face: '图片里的人脸似乎太小：请裁剪到头部和肩部，否则口型不动或很僵硬。',
  nobody: '图片只有一种颜色，看不到人。',
  no_such_presenter: '没有这位主播。',
  no_such_portrait: '图片已过期，请重新上传。',
  no_such_session: '对话已结束，或从未存在。请重新开始。',
  no_h264: '此浏览器没有提供 H.264。',
  too_large: '内容太大。',
  timeout: '请求未能及时完成。',
  connect_timeout: '声音和画面没有连上。可能有防火墙或 VPN 拦截 UDP。',
  connection_lost: '连接中断且未恢复，请按“开始”重试。',
  prepare_timeout: '主播准备时间过长，请按“开始”重试。',
  session_limit: '对话已达最长时间。',
  idle_limit: '很久没有人说话，座位已让出。',
  stopped: '对话已结束。',
  abandoned: '对话被服务结束，请按“开始”重试。',
};

/** `text` in the reader's language; `{name}` is replaced from `values`. */
export function t(text, values = {}) {
  const found = language === 'zh' ? ZH[text] ?? text : text;
  return found.replace(/\{(\w+)\}/g, (all, name) => (name in values ? String(values[name]) : all));
}

/** The server's sentence in the reader's language, as far as its code is known. */
export const told = (code, text) => (language === 'zh' ? ZH_CODES[code] ?? text : text);

/** Puts the page's own words into the reader's language. */
export function translate(root = document) {
  document.documentElement.lang = language === 'zh' ? 'zh-CN' : 'en';
  if (language === 'en') return;
  const words = document.createTreeWalker(root.body ?? root, NodeFilter.SHOW_TEXT);
  while (words.nextNode()) {
    const { data } = words.currentNode;
    const key = data.replace(/\s+/g, ' ').trim();
    if (key in ZH) words.currentNode.data = data.replace(data.trim(), () => ZH[key]);
  }
  for (const name of ['aria-label', 'title', 'alt', 'content']) {
    for (const element of root.querySelectorAll(`[${name}]`)) {
      const key = element.getAttribute(name);
      if (key in ZH) element.setAttribute(name, ZH[key]);
    }
  }
}
